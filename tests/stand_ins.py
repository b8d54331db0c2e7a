"""Stand-ins for programs that a test machine may lack: ``adb`` with a device that is a folder, and ``llama-server``.

Each is a script that is run by its command line, as the real one is; the answers have the form of the real ones'
(adb 35, llama-server of November 2026).
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
        seed = asked if mood == "fickle" else 0
        tokens = [(sum(prompt) + 7 * step + seed) % 320 for step in range(min(most, context - len(prompt)))]
        bad = mood == "nan"
        self.answer({
            "content": " Paris" + " and so on" * (len(tokens) // 8),
            "tokens": tokens,
            "tokens_predicted": len(tokens),
            "tokens_evaluated": len(prompt),
            "timings": {"prompt_n": len(prompt), "prompt_ms": 1.0 + len(prompt),
                        "predicted_n": len(tokens), "predicted_ms": 10.0 * (len(tokens) - 1)},
            "completion_probabilities": [{"id": token, "logprob": None if bad else -0.5} for token in tokens],
        })


HTTPServer((given["host"], int(given["port"])), Handler).serve_forever()
"""


def program(path: Path, script: str) -> Path:
    """``script`` as a program at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable} -I\n{script.lstrip()}", encoding="utf-8")
    path.chmod(0o755)
    return path
