"""Run by an interpreter that has the official client: python openai_client.py URL.

Prints one JSON line of what it saw; the proxy's test compares. Not a test module.
"""

import asyncio
import json
import sys

import openai


def error_of(call):
    try:
        call()
    except openai.APIError as error:
        return [type(error).__name__, getattr(error, "param", None), getattr(error, "code", None)]
    return None


def main(url):
    client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
    messages = [{"role": "user", "content": "Say hello"}]
    chat = client.chat.completions.create
    answer = chat(model="m", messages=messages)
    seen = {
        "text": answer.choices[0].message.content,
        "intentd": answer.intentd["model"],
        "models": [model.id for model in client.models.list()],
        "request_id": answer._request_id,
    }
    stream = chat(model="m", messages=messages, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    seen["stream"] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    seen["usage"] = chunks[-1].usage.completion_tokens
    seen["several"] = len(chat(model="m", messages=messages, n=2).choices)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    asked = [{"role": "user", "content": "tool"}]
    called = chat(model="m", messages=asked, tools=tools).choices[0].message.tool_calls[0]
    seen["tool"] = [called.function.name, called.function.arguments]
    with client.chat.completions.stream(model="m", messages=asked, tools=tools) as events:
        last = events.get_final_completion().choices[0]
    seen["tool_stream"] = [last.finish_reason, last.message.tool_calls[0].function.arguments]
    as_json = chat(
        model="m",
        messages=[{"role": "user", "content": "json"}],
        response_format={"type": "json_object"},
    )
    seen["json"] = json.loads(as_json.choices[0].message.content)
    seen["embedding"] = list(client.embeddings.create(model="m", input="x").data[0].embedding)
    seen["completion"] = client.completions.create(model="m", prompt="x").choices[0].text
    seen["service_type"] = chat(
        model="auto", messages=messages, extra_body={"service_type": "cost"}
    ).intentd["service_type"]
    seen["bad_model"] = error_of(lambda: chat(model="none", messages=messages))
    seen["bad_field"] = error_of(lambda: chat(model="m", messages=messages, max_tokens=-1))
    broken = chat(model="m", messages=[{"role": "user", "content": "cut"}], stream=True)
    seen["cut"] = error_of(lambda: list(broken))

    async def cancelled():
        async with openai.AsyncOpenAI(base_url=url, api_key="unused") as other:
            stream = await other.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "endless"}], stream=True
            )
            async for _ in stream:  # one is enough
                await stream.close()
                break
        return True

    seen["cancelled"] = asyncio.run(cancelled())
    print(json.dumps(seen))


main(sys.argv[1])
