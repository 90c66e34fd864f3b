"""Hub ids against a small hub of our own on this machine: what is asked for, what is not, and what works without it.

`huggingface_hub` reads its endpoint and cache from the environment when it is imported, so the reading is done by
programs of their own, each with many jobs.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

from duo_mlx.convert.readers import hub
from duo_mlx.errors import DuoError

PROGRAM = """
import json, sys
from duo_mlx.convert.readers import open_checkpoint
from duo_mlx.errors import DuoError

found = []
for source, revision in json.loads(sys.argv[1]):
    try:
        checkpoint = open_checkpoint(source, revision=revision)
        values = {name: tensor.load().reshape(-1)[0].item() for name, tensor in checkpoint.tensors.items()}
        local = sorted(file.name for file in checkpoint.source.iterdir())
        files = [file.name for file in checkpoint.files]
        found.append([checkpoint.format, files, checkpoint.config, values, local])
    except DuoError as error:
        found.append(str(error))
print(json.dumps(found))
"""


COMMANDS = """
import json, sys
from click.testing import CliRunner
from duo_mlx.cli import main

found = []
for arguments in json.loads(sys.argv[1]):
    done = CliRunner().invoke(main, arguments, prog_name="duo-mlx")
    found.append([done.exit_code, done.stdout, done.stderr])
print(json.dumps(found))
"""


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def one(value):
    return torch.full((2,), float(value))


def index(**weight_map):
    return json.dumps({"weight_map": {name: f"{shard}.safetensors" for name, shard in weight_map.items()}}).encode()


CONFIG = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "README.md": b"# A model"}
SHARDED = CONFIG | {
    "generation_config.json": b'{"eos_token_id": 2}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": index(a="model-1", b="model-2"),
    "model-1.safetensors": save({"a": one(1)}),
    "model-2.safetensors": save({"b": one(2)}),
    "model-3.safetensors": save({"unused": one(3)}),
    "pytorch_model.bin": pickled({"a": one(1)}),
    "tf_model.h5": b"",
    "original/consolidated.00.pth": pickled({"a": one(1)}),
}
SECOND = SHARDED | {"model-1.safetensors": save({"a": one(7)})}


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32,
}


def judged(model_type="llama", **changes):
    """A repository whose config.json is to be judged; its weights are not what it says."""
    config = {**SIZES, "model_type": model_type} | changes
    return {"main": {"config.json": json.dumps(config).encode(), "model.safetensors": save({"a": one(1)})}}


@pytest.fixture(scope="module")
def repositories(gguf, saved):
    """What the hub holds, by repository and revision."""
    duo, _ = saved()
    return {
        "t/duo": {"main": {file.name: file.read_bytes() for file in duo.iterdir()}},
        "t/dense": judged(),
        "t/unknown": judged("zzz"),
        "t/no-ffn": judged("mamba", time_step_rank=1, state_size=4, conv_kernel=4, use_bias=False, use_conv_bias=True),
        "t/gptq": judged(quantization_config={"quant_method": "gptq", "bits": 4}),
        "t/code": judged(model_file="model.py"),
        "t/newer": judged("duo", small_intermediate_size=8, duo_version=9),
        "t/gone": judged("duo", small_intermediate_size=8, base_model_type="zzz"),
        "t/sharded": {"main": SHARDED, "v2": SECOND},
        "t/bin": {"main": CONFIG | {"pytorch_model.bin": pickled({"a": one(4)}), "training_args.bin": b"x"}},
        "t/unnamed": {"main": CONFIG | {"weights.safetensors": save({"a": one(5)}), "readme.txt": b""}},
        "t/gguf": {"main": {"x.gguf": gguf(), "y.gguf": gguf("Q8_0"), "README.md": b""}},
        "t/never": {"main": SHARDED},
        "t/nothing": {"main": CONFIG},
        "t/leaves": {"main": CONFIG | {"model.safetensors.index.json": index(a="../../x")}},
    }


@pytest.fixture(scope="module")
def server(repositories):
    """The hub's address, and the list of files that it was asked for, as repository, revision and name."""
    asked = []
    commits = {
        (name, revision): hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
        for name, revisions in repositories.items()
        for revision in revisions
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, code, content=b"", **headers):
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def say(self, value):
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def find(self, name, revision):
            for known, content in repositories.get(name, {}).items():
                if revision in (known, commits[name, known]):
                    return commits[name, known], content
            error = "RevisionNotFound" if name in repositories else "RepoNotFound"
            self.answer(404, X_Error_Code=error, X_Error_Message=f"{error} said the hub")
            return None

        def do_GET(self):
            match unquote(urlsplit(self.path).path).strip("/").split("/"):
                case ["api", "models", owner, "gated", *_]:
                    self.answer(403, X_Error_Code="GatedRepo", X_Error_Message=f"{owner}/gated is gated")
                case ["api", "models", owner, name]:
                    self.info(f"{owner}/{name}", "main")
                case ["api", "models", owner, name, "revision", revision]:
                    self.info(f"{owner}/{name}", revision)
                case ["api", "models", owner, name, "tree", revision, *_]:
                    if found := self.find(f"{owner}/{name}", revision):
                        sizes = {file: len(content) for file, content in found[1].items()}
                        self.say([{"type": "file", "path": f, "size": n, "oid": f} for f, n in sizes.items()])
                case [owner, name, "resolve", revision, *parts]:
                    if found := self.find(f"{owner}/{name}", revision):
                        file = "/".join(parts)
                        if self.command == "GET":
                            asked.append((f"{owner}/{name}", found[0], file))
                        tag = hashlib.sha1(found[1][file]).hexdigest()
                        self.answer(200, found[1][file], ETag=f'"{tag}"', X_Repo_Commit=found[0])
                case _:
                    self.answer(404)

        do_HEAD = do_GET  # noqa: N815 (the base class looks for it)

        def info(self, name, revision):
            if found := self.find(name, revision):
                self.say({"id": name, "sha": found[0], "siblings": [{"rfilename": file} for file in found[1]]})

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}", asked
    served.shutdown()
    served.server_close()
    thread.join()


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """``read(jobs, **environment)``: what a program of its own finds, with a cache that all calls share."""
    home = tmp_path_factory.mktemp("home")

    def run(jobs, program=PROGRAM, **environment):
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
        }
        kept |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"} | environment
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(jobs)], capture_output=True, text=True, env=kept, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


JOBS = [
    ("t/sharded", None),
    ("t/sharded", "v2"),
    ("t/bin", None),
    ("t/unnamed", "main"),
    ("t/gguf:y.gguf", None),
    ("t/gguf", None),
    ("t/gguf:z.gguf", None),
    ("t/nothing", None),
    ("t/leaves", None),
    ("t/absent", None),
    ("t/sharded", "v9"),
    ("t/gated", None),
]


@pytest.fixture(scope="module")
def online(server, read):
    """What came of `JOBS`, and which files were asked for."""
    address, asked = server
    results = read(JOBS, HF_ENDPOINT=address)
    return dict(zip(JOBS, results, strict=True)), list(asked)


def test_only_the_needed_files_are_asked_for(online):
    results, asked = online
    commit = hashlib.sha1(b"t/sharded main").hexdigest()
    needed = ["chat_template.jinja", "config.json", "generation_config.json", "model-1.safetensors"]
    needed += ["model-2.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    assert sorted(file for name, revision, file in asked if (name, revision) == ("t/sharded", commit)) == needed
    kind, files, config, values, local = results["t/sharded", None]
    assert (kind, files) == ("safetensors", ["model-1.safetensors", "model-2.safetensors"])
    assert config == {"model_type": "llama"} and values == {"a": 1, "b": 2} and local == needed
    for name, file in (("t/bin", "pytorch_model.bin"), ("t/unnamed", "weights.safetensors")):
        assert {part for of, _, part in asked if of == name} == {"config.json", file, "tokenizer.json"}


def test_revisions_and_formats(online):
    results, _ = online
    assert results["t/sharded", "v2"][3] == {"a": 7, "b": 2}
    assert results["t/bin", None][:2] == ["PyTorch", ["pytorch_model.bin"]] and results["t/bin", None][3] == {"a": 4}
    assert results["t/unnamed", "main"][3] == {"a": 5}


def test_one_gguf_of_several(online):
    results, asked = online
    kind, files, config, _, _ = results["t/gguf:y.gguf", None]
    assert (kind, files, config["hidden_size"]) == ("GGUF", ["y.gguf"], 64)
    assert [file for name, _, file in asked if name == "t/gguf"] == ["y.gguf"]


@pytest.mark.parametrize(
    ("job", "line"),
    [
        (("t/gguf", None), "t/gguf: holds several weights files (x.gguf, y.gguf); name one: t/gguf:x.gguf"),
        (("t/gguf:z.gguf", None), "t/gguf: holds no z.gguf"),
        (("t/nothing", None), "t/nothing: holds no weights file; it must have one of model.safetensors.index.json"),
        (("t/leaves", None), "which is not a file beside it"),
        (
            ("t/absent", None),
            "t/absent: there is no such file or directory, and the hub does not give it: it has no such",
        ),
        (
            ("t/sharded", "v9"),
            "t/sharded (revision v9): there is no such file or directory, and the hub does not give it",
        ),
        (("t/gated", None), "it is gated; ask for access on its page and log in"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(online, job, line):
    message = online[0][job]
    assert isinstance(message, str) and line in message and message.isprintable() and len(message) < 400


def test_offline_means_the_cache_and_nothing_else(online, server, read):
    address, asked = server
    jobs = [("t/sharded", None), ("t/sharded", "v2"), ("t/bin", None), ("t/gguf:y.gguf", None), ("t/never", None)]
    before = len(asked)
    *found, never = read(jobs, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert len(asked) == before
    assert found == [online[0][job] for job in jobs[:-1]]
    assert never.startswith("t/never: there is no such file or directory, and the hub does not give it: ")


def test_a_hub_out_of_reach_is_as_good_as_offline(online, read):
    found, never = read([("t/sharded", None), ("t/never", None)], HF_ENDPOINT="http://127.0.0.1:9")
    assert found == online[0]["t/sharded", None]
    assert never.startswith("t/never: there is no such file or directory, and the hub does not give it: ")


GRAFT = ("--graft", "--calibrate", "TEXT")
JUDGED = [
    (("convert", "t/unknown", "DST", *GRAFT), "t/unknown: the installed mlx-lm has no architecture 'zzz'"),
    (("convert", "t/no-ffn", "DST", *GRAFT), "no Duo can be hosted in a mamba: a layer has no FFN"),
    (("convert", "t/gptq", "DST", *GRAFT), "t/gptq: its weights are quantised (gptq)"),
    (("convert", "t/code", "DST", *GRAFT), "t/code: config.json has a model_file, which is code of its own"),
    (("convert", "t/dense", "DST"), "t/dense: is a dense model, not a Duo; --graft makes a Duo of it"),
    (("convert", "t/duo", "DST", *GRAFT), "t/duo: is a Duo model already, so there is nothing to graft"),
    (("convert", "t/newer", "DST"), "the Duo is of version 9 and this package reads 2"),
    (("convert", "t/newer", "DST", "--to", "torch"), "the Duo is of version 9 and this package reads 2"),
    (
        ("generate", "--model", "t/newer", "w1"),
        "t/newer: config.json: the Duo is of version 9 and this package reads 2",
    ),
    (("generate", "--model", "t/gone", "w1"), "t/gone: the installed mlx-lm has no architecture 'zzz'"),
    (("generate", "--model", "t/dense", "w1"), "t/dense: model_type is 'llama', so it is a dense model, not a Duo"),
]


@pytest.fixture(scope="module")
def commanded(server, read, tmp_path_factory):
    """What came of the commands in `JUDGED` and of two more, and which files each repository was asked for."""
    address, asked = server
    folder = tmp_path_factory.mktemp("commands")
    (folder / "text").write_text("w1 w2")
    there = {"TEXT": str(folder / "text"), "DST": str(folder / "none")}
    jobs = [[there.get(word, word) for word in arguments] for arguments, _ in JUDGED]
    jobs += [["generate", "--model", "t/duo", "w1", "--max-tokens", "2"], ["convert", "t/duo", str(folder / "duo")]]
    before = len(asked)
    found = read(jobs, COMMANDS, HF_ENDPOINT=address, HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert sorted(path.name for path in folder.iterdir()) == ["duo", "text"]
    return found, asked[before:]


@pytest.mark.parametrize("number", range(len(JUDGED)), ids=lambda number: " ".join(JUDGED[number][0][:3]))
def test_what_config_json_rules_out_is_refused(commanded, number):
    code, output, error = commanded[0][number]
    assert (code, output, error.count("\n")) == (2, "", 1) and JUDGED[number][1] in error


def test_nothing_large_is_downloaded_for_what_config_json_rules_out(commanded):
    _, asked = commanded
    refused = {word for arguments, _ in JUDGED for word in arguments if word.startswith("t/")} - {"t/duo"}
    files = {name: [file for of, _, file in asked if of == name] for name in refused}
    assert files == {name: ["config.json"] for name in refused}


def test_a_duo_of_the_hub_generates_and_is_converted(commanded):
    found, asked = commanded
    assert [code for code, *_ in found[-2:]] == [0, 0]
    assert sum(file == "model.safetensors" for name, _, file in asked if name == "t/duo") == 1


@pytest.mark.parametrize(
    ("source", "meaning"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name.v1:sub/x.gguf", ("owner/name.v1", "sub/x.gguf")),
        ("owner/name/x.gguf", None),
        ("models/x.gguf", None),
        ("models/x.safetensors", None),
        ("./models", None),
        ("../models", None),
        ("/models", None),
        ("name", None),
        ("owner/name:", None),
        ("owner/na me", None),
    ],
)
def test_what_is_a_hub_id(source, meaning):
    assert hub.parse(source) == meaning


def test_the_weights_file_of_a_repository():
    both = ["model.safetensors", "pytorch_model.bin", "a.gguf"]
    assert hub.choose("o/n", both) == "model.safetensors"
    assert hub.choose("o/n", ["model.safetensors.index.json", *both]) == "model.safetensors.index.json"
    assert hub.choose("o/n", both[1:]) == "pytorch_model.bin" and hub.choose("o/n", both[2:]) == "a.gguf"
    assert hub.choose("o/n", both, "a.gguf") == "a.gguf"
    with pytest.raises(DuoError, match="o/n:README.md: is no weights file"):
        hub.choose("o/n", ["README.md"], "README.md")
