"""What a server meets in a day, for Locust: questions, clients that leave, bodies that are none, images too large.

    locust --headless --users 6 --run-time 10m --host http://127.0.0.1:8000 -f benchmarks/locustfile.py

`python -m benchmarks.soak` runs it beside a server and watches that.
"""

import base64
import json
import os
import random

from locust import HttpUser, between, task

PAGES = os.environ["SOAK_PAGES"].split(os.pathsep)  # files of images
OVERSIZE = 21 << 20  # bytes, above the server's default
BUSY = 429


class Client(HttpUser):
    """What is answered as it should be is no failure: 400 and 413 to what deserves them, 429 in a rush."""

    wait_time = between(0, 1)

    def on_start(self) -> None:
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]

    def body(self, stream: bool) -> dict:
        with open(random.choice(PAGES), "rb") as file:
            url = f"data:image/png;base64,{base64.b64encode(file.read()).decode()}"
        question = random.choice(("What is the total?", "What is the date?", "Describe the page."))
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "user", "content": content}]
        return {"model": self.model, "messages": messages, "max_tokens": random.randint(1, 48), "stream": stream}

    def post(self, name: str, **options):
        return self.client.post("/v1/chat/completions", name=name, catch_response=True, **options)

    @task(10)
    def question(self) -> None:
        with self.post("question", json=self.body(stream=False)) as answer:
            if answer.status_code == BUSY or (answer.status_code == 200 and answer.json()["choices"]):
                answer.success()
            else:
                answer.failure(f"{answer.status_code}: {answer.text[:200]}")

    @task(5)
    def stream(self) -> None:
        with self.post("stream", json=self.body(stream=True), stream=True) as answer:
            lines = [line for line in answer.iter_lines() if line]
            if answer.status_code == BUSY or (lines and lines[-1] == b"data: [DONE]" and b"error" not in lines[-2]):
                answer.success()
            else:
                answer.failure(f"{answer.status_code}: {lines[-2:]}")

    @task(5)
    def leave(self) -> None:
        with self.post("leave", json=self.body(stream=True), stream=True) as answer:
            for number, _ in enumerate(answer.iter_lines()):
                if number >= random.randint(0, 12):
                    break
            answer.close()
            if answer.status_code in (200, BUSY):
                answer.success()
            else:
                answer.failure(str(answer.status_code))

    @task(4)
    def malformed(self) -> None:
        whole = json.dumps(self.body(stream=False)).encode()
        broken = random.choice((whole[: random.randint(0, len(whole) - 1)], random.randbytes(1000), b"[]", b"null"))
        self.expect(self.post("malformed", data=broken), 400)

    @task(1)
    def oversize(self) -> None:
        url = f"data:image/png;base64,{base64.b64encode(random.randbytes(OVERSIZE)).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        self.expect(self.post("oversize", json=body), 413)

    @staticmethod
    def expect(posted, expected: int) -> None:
        with posted as answer:
            if answer.status_code == expected:
                answer.success()
            else:
                answer.failure(f"{answer.status_code} where {expected} is due: {answer.text[:200]}")
