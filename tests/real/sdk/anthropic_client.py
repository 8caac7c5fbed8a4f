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
    print(json.dumps(seen))


main(sys.argv[1])
