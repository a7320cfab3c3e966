"""A stand-in classifier: OpenAI's moderations shape over `alt-profanity-check`. It sees rudeness, not harm.

    pip install aiohttp alt-profanity-check
    python examples/classifier/serve.py --port 8001

For trying things out and for tests. Put a real one in its place before anybody relies on it.
"""

import argparse
import asyncio
from typing import Any

from aiohttp import web
from profanity_check import predict_prob

LIMIT = 0.7


def judge(texts: list[str]) -> list[float]:
    return [float(score) for score in predict_prob(texts)]


async def moderations(request: web.Request) -> web.Response:
    """`POST /v1/moderations` with `input`: a text or a list of them. The model runs in a thread."""
    told: Any = await request.json()
    given = told["input"]
    texts = [given] if isinstance(given, str) else [str(text) for text in given]
    scores = await asyncio.to_thread(judge, texts)
    results = [
        {"flagged": score > LIMIT, "categories": {"profanity": score > LIMIT}, "category_scores": {"profanity": score}}
        for score in scores
    ]
    return web.json_response({"id": "modr-stand-in", "model": "alt-profanity-check", "results": results})


def make_app() -> web.Application:
    app = web.Application()
    app.add_routes([web.post("/v1/moderations", moderations)])
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    arguments = parser.parse_args()
    web.run_app(make_app(), host=arguments.host, port=arguments.port)


if __name__ == "__main__":
    main()
