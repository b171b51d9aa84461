"""A server in a thread of the test's own process, and waiting for things."""

import base64
import io
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import openai
import uvicorn
from PIL import Image

from runtime.serve.app import create_app
from runtime.serve.chat import ChatService
from runtime.serve.metrics import Metrics
from runtime.serve.scheduler import Scheduler

WAIT = 120  # seconds, that a test waits for what must come


def scheduler_of(model, *options):
    scheduler = Scheduler(model.encoder, model.decoder, model.cache, *options)
    scheduler.start()
    return scheduler


class Served:
    def __init__(self, model, slots=2, queue_size=4, limits=None, fetch=None, takes_embeds=False, **options):
        self.model, metrics = model, Metrics()
        self.scheduler = scheduler_of(model, slots, queue_size, metrics)
        self.service = ChatService(model, self.scheduler, limits, fetch, takes_embeds=takes_embeds)
        app = create_app(self.service, metrics, **options)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error", http="h11"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started)

    def client(self, key="none"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT)

    def get(self, path):
        try:
            with urllib.request.urlopen(self.url + path, timeout=WAIT) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def close(self):
        self._server.should_exit = True
        self._thread.join(WAIT)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def slow_down(monkeypatch, scheduler):
    """A step takes 10 ms at least, so that 3,000 tokens are 30 s on any machine."""
    step = scheduler._slots.step

    def step_slowly(fed):
        time.sleep(0.01)
        return step(fed)

    monkeypatch.setattr(scheduler._slots, "step", step_slowly)


def picture(seed=0, size=(96, 128)):
    """The bytes of a PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def asked(text, *images):
    """The messages of a question about images."""
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}]
