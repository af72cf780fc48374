"""`coral serve` under several clients at once: tokens per second in all, and the time to the first token.

    python -m benchmarks.serve                                  # pico on its held-out prompts
    python -m benchmarks.serve --old ../before my.yaml          # beside the server of another checkout, in turns
    python -m benchmarks.serve --transformers                   # and beside `transformers serve` (its extra: serving)

Each client asks one question after the other and reads the stream. All servers run at once, and only one of them is
asked at a time, so that a machine that slows down favours none. Half of the questions are answered greedily, half
at temperature 1; answers of the servers are compared. With the turns of `--old`, an answer takes its turn round by
round; here, a round is shared by all.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.record import RESULTS, record
from coral_core.bench.questions import held_out
from coral_core.embedded import model_source
from coral_core.recipe.loader import load_recipe
from coral_core.recipe.schema import Recipe

ROOT = Path(__file__).parent.parent
QUESTIONS, LEAST = 2, 8
"""Of each client in one run; and of all together at least: the two servers draw other words at temperature 1."""
START_S = 600.0
"""A server that takes longer to load its model does not come up at all."""


@contextlib.contextmanager
def server(checkout: Path, arguments: Sequence[str], active: int) -> Iterator[str]:
    """The address of a server that is up, of that checkout's code."""
    command = [sys.executable, "-m", "coral_cli.main", "serve", *arguments, "--port", "0", "--active", str(active)]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    # From within the checkout: Python looks into the working folder before PYTHONPATH.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=checkout) as process:
        try:
            assert process.stderr is not None
            address = next((part for line in process.stderr for part in line.split() if part.startswith("http")), "")
            if not address:
                raise SystemExit(f"the server of {checkout} does not start; try: {' '.join(command)}")
            yield address.removeprefix("http://").split("/")[0]
        finally:
            process.terminate()


@contextlib.contextmanager
def transformers_server(model: str) -> Iterator[str]:
    """The address of `transformers serve` with its own defaults, once it answers for that model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            begun_s = time.monotonic()
            while not _healthy(f"127.0.0.1:{port}"):
                if process.poll() is not None or time.monotonic() - begun_s > START_S:
                    raise SystemExit(f"transformers serve does not start; try: {' '.join(command)}")
                time.sleep(0.5)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def _healthy(address: str) -> bool:
    with contextlib.closing(http.client.HTTPConnection(address, timeout=5)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False


def ask(address: str, body: dict[str, Any]) -> tuple[str, int, float, float]:
    """(text, tokens, seconds to the first text, seconds in all) of one streamed completion."""
    connection = http.client.HTTPConnection(address, timeout=START_S)
    begun_s, first_s, text, tokens = time.perf_counter(), 0.0, "", 0
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            piece = "".join(choice["text"] for choice in chunk["choices"])
            first_s = first_s or (time.perf_counter() - begun_s if piece else 0.0)
            text += piece
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return text, tokens, first_s, time.perf_counter() - begun_s


def load(address: str, clients: int, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What so many clients saw, each with its own questions out of `bodies`."""
    each = max(QUESTIONS, LEAST // clients)

    def client(number: int) -> list[tuple[str, int, float, float]]:
        own = itertools.islice(itertools.cycle(bodies), number * each, (number + 1) * each)
        return [ask(address, body) for body in own]

    begun_s = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for own in pool.map(client, range(clients)) for answer in own]
    elapsed_s = time.perf_counter() - begun_s
    return {
        "tokens_per_s": sum(answer[1] for answer in answers) / elapsed_s,
        "first_s": [answer[2] for answer in answers],
        "texts": [answer[0] for answer in answers],
    }


def make_bodies(recipe: Recipe, run: Path, tokens: int) -> list[dict[str, Any]]:
    """Held-out prompts as text, which every server takes, as requests."""
    body = {"max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    tokenizer = AutoTokenizer.from_pretrained(model_source(recipe.target.model))
    texts = [tokenizer.decode(question.ids) for question in held_out(run, recipe.target.model)]
    return [body | {"prompt": text, "temperature": number % 2, "seed": number} for number, text in enumerate(texts)]


def race(
    addresses: dict[str, tuple[str, str]], clients: Sequence[int], bodies: Sequence[dict[str, Any]], repeats: int
) -> Iterator[dict[str, Any]]:
    """A row for each lane (an address, and what the model is called there) and number of clients: medians over the
    repeats, the lanes in turns."""
    asked = {lane: [body | {"model": model} for body in bodies] for lane, (_, model) in addresses.items()}
    for lane, (address, _) in addresses.items():
        load(address, 1, asked[lane])  # warms up
    for count in clients:
        seen: dict[str, list[dict[str, Any]]] = {lane: [] for lane in addresses}
        for repeat in range(repeats):
            for lane in list(addresses)[:: -1 if repeat % 2 else 1]:
                seen[lane].append(load(addresses[lane][0], count, asked[lane]))
        first = next(iter(seen.values()))[0]["texts"]
        for lane, runs in seen.items():
            first_s = sorted(value for one in runs for value in one["first_s"])
            yield {
                "lane": lane,
                "clients": count,
                "tokens_per_s": statistics.median(one["tokens_per_s"] for one in runs),
                "first_token_median_s": statistics.median(first_s),
                "first_token_p95_s": first_s[min(len(first_s) - 1, int(0.95 * len(first_s)))],
                "answers": len(first),
                "equal": sum(own == other for own, other in zip(runs[0]["texts"], first, strict=True)),
            }


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ratios that a reader looks for; none where a row is missing."""
    speed = {(row["lane"], row["clients"]): row["tokens_per_s"] for row in rows}

    def over(one: tuple[str, int], other: tuple[str, int]) -> float | None:
        return speed[one] / speed[other] if one in speed and other in speed else None

    return {
        "serve8_over_turns": over(("shared", 8), ("turns", 8)),
        "serve8_over_one": over(("shared", 8), ("shared", 1)),
        "serve1_over_turns": over(("shared", 1), ("turns", 1)),
        "serve1_over_transformers": over(("shared", 1), ("transformers", 1)),
        "serve8_over_transformers": over(("shared", 8), ("transformers", 8)),
    }


def kept(name: str, model: str) -> list[dict[str, Any]]:
    """Rows of other models that are in the results already."""
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return [row for row in rows if row["model"] != model]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="a checkout whose server takes turns")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--name", default="serve", help="of the file in results/")
    parser.add_argument("--transformers", action="store_true", help="a lane of `transformers serve`")
    options, rest = parser.parse_known_args()
    files = [Path(text) for text in rest if "=" not in text]
    recipe = load_recipe(files[0] if files else None, [text for text in rest if "=" in text])
    bodies = make_bodies(recipe, options.runs / recipe.name, options.tokens)
    arguments, active = [*rest, "--runs", str(options.runs.resolve())], max(options.clients)
    with contextlib.ExitStack() as stack:
        addresses = {"shared": (stack.enter_context(server(ROOT, arguments, active)), recipe.name)}
        if options.old:
            addresses["turns"] = stack.enter_context(server(options.old, arguments, active)), recipe.name
        if options.transformers:
            source = model_source(recipe.target.model)
            addresses["transformers"] = stack.enter_context(transformers_server(source)), source
        rows = kept(options.name, recipe.name)
        for row in race(addresses, options.clients, bodies, options.repeats):
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append({"model": recipe.name} | row)
    models = dict.fromkeys(row["model"] for row in rows)
    found = {model: figures([row for row in rows if row["model"] == model]) for model in models}
    print(json.dumps(found, indent=1))
    print(record(options.name, {**found.pop("pico", {}), **found}, rows, recipe.name))


if __name__ == "__main__":
    main()
