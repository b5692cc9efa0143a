"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from server.api.errors import DOCUMENTED, invalid
from server.api.protocol import Detokenized, DetokenizeRequest, StraceOptions, Tokenized, TokenizeRequest
from server.api.served import Served, served_model

router = APIRouter(responses=DOCUMENTED)


def encode(served: Served, body: TokenizeRequest) -> list[int]:
    """The ids of a text or a conversation."""
    if body.messages is None:
        return served.encode_text(body.prompt or "", body.add_special_tokens)
    return served.encode_chat(served.write_chat(body.messages, body.add_generation_prompt))


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Tokenized:
    """Text as token ids."""
    served = served_model(request)
    served.route(body.model or served.name, StraceOptions())
    ids = await run_in_threadpool(encode, served, body)
    strings = served.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return Tokenized(count=len(ids), max_model_len=served.context, tokens=ids, token_strs=strings)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Detokenized:
    """Token ids as text, special tokens shown."""
    served = served_model(request)
    served.route(body.model or served.name, StraceOptions())
    if any(token >= served.vocabulary for token in body.tokens):
        raise invalid(f"there are token ids of {served.vocabulary} or more", "tokens")
    return Detokenized(prompt=await run_in_threadpool(served.tokenizer.decode, body.tokens))
