"""Stand-ins for programs that a test machine may lack: ``adb`` with a device that is a folder, ``llama-server`` and
``llama-bench``.

Each is a script that is run by its command line, as the real one is; the answers have the form of the real ones'
(adb 35, llama-server and llama-bench of November 2026).
"""

from __future__ import annotations

import sys
from pathlib import Path

ADB = r"""
import os, subprocess, sys

state, log = os.environ.get("STAND_IN_DEVICES", "R5CT"), os.environ.get("STAND_IN_LOG")
words = sys.argv[1:]
if log:
    with open(log, "a") as stream:
        stream.write(" ".join(words) + "\n")
serial = None
if words[:1] == ["-s"]:
    serial, words = words[1], words[2:]
known = state.split()
if serial is not None and serial not in known:
    sys.exit(f"adb: device '{serial}' not found")
if not known:
    sys.exit("adb: no devices/emulators found")
if serial is None and len(known) > 1:
    sys.exit("adb: more than one device/emulator")
command, rest = words[0], words[1:]
if command == "shell":  # the words become one line for the shell over there
    code = subprocess.run(["sh", "-c", " ".join(rest)]).returncode
    sys.exit(code if code >= 0 else 128 - code)
elif command == "push":
    source, target = rest
    with open(source, "rb") as stream, open(target, "wb") as out:
        out.write(stream.read())
    print(f"{source}: 1 file pushed, 0 skipped.")
elif command == "forward" and rest[0] == "--remove":
    pass
elif command == "forward" and rest[0] == "tcp:0":  # the device is this machine: its port is the one here
    print(rest[1].removeprefix("tcp:"))
else:
    sys.exit(f"adb: unknown command {command}")
"""

LLAMA_SERVER = r"""
import argparse, json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

parser = argparse.ArgumentParser()
for option in ("-m", "-c", "-ctk", "-ctv", "-fa", "-ngl", "--n-cpu-moe", "-t", "-sm", "-np", "--cache-ram"):
    parser.add_argument(option)
for option in ("--ctx-checkpoints", "-ub", "--host", "--port"):
    parser.add_argument(option)
parser.add_argument("--no-repack", action="store_true")
given = vars(parser.parse_args())
mood = os.environ.get("STAND_IN_MOOD", "")
if mood == "dies":
    print("main: error loading model: out of luck", file=sys.stderr)
    os.abort()
context, size = int(given["c"]), os.stat(given["m"]).st_size
asked = 0


class Handler(BaseHTTPRequestHandler):
    def answer(self, value, code=200):
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass

    def do_GET(self):
        if self.path == "/health":
            self.answer({"status": "ok"})
        elif self.path == "/props":
            self.answer({"build_info": "b1-stand-in"})
        else:
            self.answer({"object": "list", "data": [{"id": given["m"], "meta": {"n_vocab": 320, "size": size}}]})

    def do_POST(self):
        global asked
        asked += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.answer({"tokens": [3 + byte for byte in body["content"].encode()]})
        prompt, most = body["prompt"], body["n_predict"]
        if mood == "dies at the end" and len(prompt) + most == context:
            os.abort()
        if len(prompt) >= context:
            return self.answer({"error": {"code": 400, "message": "exceeds the available context size"}}, 400)
        # A model whose metadata ask for penalties, which every answer changes.
        penalised = mood == "penalising" and "penalties" in body.get("samplers", ["penalties", "top_k"])
        seed = asked if mood == "fickle" or penalised else 0
        tokens = [(sum(prompt) + 7 * step + seed) % 320 for step in range(min(most, context - len(prompt)))]
        bad = mood == "nan"
        told = {"tokens": tokens}
        told["completion_probabilities"] = [{"id": token, "logprob": None if bad else -0.5} for token in tokens]
        if mood == "taciturn":
            told = {}
        self.answer({
            **told,
            "content": " Paris" + " and so on" * (len(tokens) // 8),
            "tokens_predicted": len(tokens),
            "tokens_evaluated": len(prompt),
            "timings": {"prompt_n": len(prompt), "prompt_ms": 1.0 + len(prompt),
                        "predicted_n": len(tokens), "predicted_ms": 10.0 * (len(tokens) - 1)},
        })


HTTPServer((given["host"], int(given["port"])), Handler).serve_forever()
"""

LLAMA_BENCH = r"""
import argparse, json, os, sys, time

words = sys.argv[1:]
mood = os.environ.get("STAND_IN_MOOD", "")
if mood == "old" and "--repack" in words:
    print("error: invalid parameter for argument: --repack", file=sys.stderr)
    print("usage: llama-bench [options]\n\noptions:\n  -h, --help", file=sys.stderr)
    sys.exit(1)
parser = argparse.ArgumentParser(allow_abbrev=False)
for option in ("-m", "-t", "-b", "-ub", "-ngl", "-ctk", "-ctv", "-fa", "--n-cpu-moe", "-sm", "--repack", "-o"):
    parser.add_argument(option)
for option in ("-p", "-n", "-d", "-r"):
    parser.add_argument(option, type=int, default=0)
parser.add_argument("--progress", action="store_true")
parser.add_argument("--no-warmup", action="store_true")
given = parser.parse_args()


def tell(text):
    print(f"llama-bench: benchmark 1/1: {text}", file=sys.stderr, flush=True)


tell("starting")
if mood == "dies" or not os.path.isfile(given.m):
    print(f"llama_bench: error: failed to load model '{given.m}'", file=sys.stderr)
    sys.exit(1)
kind = "prompt" if given.p else "generation"
if not given.no_warmup:
    tell(f"warmup {kind} run")
if mood == "aborts" or (mood == "dies at the end" and given.no_warmup):
    print("ggml.c:1: GGML_ASSERT(out of luck) failed", file=sys.stderr, flush=True)
    os.abort()
if mood == "hangs":
    time.sleep(600)
for number in range(1, given.r + 1):
    if given.d:
        tell(f"depth run {number}/{given.r}" + (" (cached)" if number > 1 else ""))
    tell(f"{kind} run {number}/{given.r}")
if mood == "silent":
    sys.exit(0)
per_s = [(1000.0 if given.p else 10.0) * number for number in range(1, given.r + 1)]
print(json.dumps({
    "build_commit": "stand-in", "build_number": 7, "model_filename": given.m, "n_threads": int(given.t),
    "n_prompt": given.p, "n_gen": given.n, "n_depth": given.d, "avg_ts": sum(per_s) / len(per_s),
    "samples_ns": [round(1e9 * (given.p or given.n) / value) for value in per_s], "samples_ts": per_s,
}))
"""


def program(path: Path, script: str) -> Path:
    """``script`` as a program at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable} -I\n{script.lstrip()}", encoding="utf-8")
    path.chmod(0o755)
    return path
