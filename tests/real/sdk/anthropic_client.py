"""Run by an interpreter that has the official client: python anthropic_client.py URL.

Prints one JSON line of what it saw; the proxy's test compares. Not a test module.
"""

import json
import sys

import anthropic


def main(url):
    client = anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0)
    given = {
        "model": "m",
        "max_tokens": 50,
        "messages": [{"role": "user", "content": "Say hello"}],
    }
    answer = client.messages.create(**given)
    seen = {"text": answer.content[0].text, "out": answer.usage.output_tokens}
    with client.messages.stream(**given) as stream:
        seen["stream"] = "".join(stream.text_stream)
        seen["stop"] = stream.get_final_message().stop_reason
    try:
        client.messages.create(**{**given, "model": "none"})
    except anthropic.NotFoundError as error:
        seen["bad_model"] = error.body["error"]["type"]
    try:
        broken = {**given, "messages": [{"role": "user", "content": "cut"}]}
        with client.messages.stream(**broken) as stream:
            list(stream.text_stream)
    except anthropic.APIError as error:
        seen["cut"] = type(error).__name__
    tools = [{"name": "add", "description": "adds", "input_schema": {"type": "object"}}]
    asked = {**given, "messages": [{"role": "user", "content": "tool"}], "tools": tools}
    called = client.messages.create(**asked)
    use = called.content[0]
    seen["tool"] = [called.stop_reason, use.type, use.name, use.input]
    with client.messages.stream(**asked) as stream:
        last = stream.get_final_message()
    seen["tool_stream"] = [last.content[0].name, last.content[0].input]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "3"}
    chat = [
        *asked["messages"],
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result]},
    ]
    seen["tool_result"] = client.messages.create(**{**asked, "messages": chat}).content[0].text
    counted = client.messages.count_tokens(model="m", messages=given["messages"], tools=tools)
    seen["counted"] = counted.input_tokens > 5
    by_type = client.messages.create(**{**given, "model": "cost"})
    seen["service_type"] = [by_type.model, by_type.intentd["service_type"]]
    with client.messages.stream(**{**given, "model": "model_selector"}) as stream:
        seen["cascade_stream"] = "".join(stream.text_stream)
    print(json.dumps(seen))


main(sys.argv[1])
