"""A producer as a process: `python submitting_producer.py URL NAME COUNT` prints its requests."""

import json
import sys

from tokenmill.producer.client import Client
from tokenmill.producer.request_id import request_id_for


def main(url: str, name: str, count: str) -> None:
    with Client(url, tenant=name) as client:
        for number in range(int(count)):
            prompt = f"{name} asks {number}"
            fields = {"priority": number % 3, "max_tokens": 10 + number % 40}
            request_id = client.submit(prompt, request_id=request_id_for(prompt), **fields)
            client.submit(prompt, request_id=request_id, **fields)  # a repeat changes nothing
            print(json.dumps({"id": request_id, "prompt": prompt, **fields}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
