"""Run by an interpreter that has LangChain: python langchain_client.py URL.

Prints one JSON line of what it saw; the proxy's test compares. Not a test module.
"""

import json
import sys

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Answer(BaseModel):
    answer: int


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def seen_by(model):
    seen = {"invoke": model.invoke("Say hello").content}
    seen["stream"] = "".join(chunk.text for chunk in model.stream("Say hello"))
    able = model.bind_tools([add])
    called = able.invoke("tool")
    seen["tool"] = [[call["name"], call["args"]] for call in called.tool_calls]
    parts = None
    for chunk in able.stream("tool"):
        parts = chunk if parts is None else parts + chunk
    seen["tool_stream"] = [[call["name"], call["args"]] for call in parts.tool_calls]
    result = ToolMessage("3", tool_call_id=called.tool_calls[0]["id"])
    chat = [HumanMessage("tool"), AIMessage("", tool_calls=called.tool_calls), result]
    seen["tool_result"] = able.invoke(chat).text
    seen["structured"] = model.with_structured_output(Answer).invoke("json").answer
    return seen


def main(url):
    given = {"base_url": url, "api_key": "unused", "model": "m", "max_retries": 0}
    seen = {
        "chat": seen_by(ChatOpenAI(**given)),
        "responses": seen_by(ChatOpenAI(**given, use_responses_api=True)),
    }
    usage = ChatOpenAI(**given).invoke("Say hello").usage_metadata
    seen["tokens"] = usage["output_tokens"]
    embeddings = OpenAIEmbeddings(**given, check_embedding_ctx_length=False)
    seen["embedding"] = embeddings.embed_query("x")
    seen["service_type"] = (
        ChatOpenAI(**{**given, "model": "cost"}).invoke("Say hello").response_metadata["model_name"]
    )
    print(json.dumps(seen))


main(sys.argv[1])
