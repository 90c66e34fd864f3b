"""A result of ``duo-mlx bench run`` as if it had been measured, for what reads results."""

import copy

import numpy as np
import pytest

from duo_mlx.bench import results

LAYERS = 4
TPOT = {"big": 0.020, "BBss": 0.016, "small": 0.012, "skip": 0.010}
LOSS = {"big": 3.0, "BBss": 3.2, "small": 3.5, "skip": 7.0}
SHARES = {"big": (1.0, 0.0, 0.0), "BBss": (0.5, 0.5, 0.0), "small": (0.0, 1.0, 0.0), "skip": (0.0, 0.0, 1.0)}


def interval(value, spread=0.01):
    return {"median": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def window(joules, tokens):
    return {
        "meter": "fake",
        "label": "a fake SoC (cpu, gpu)",
        "scope": "soc",
        "seconds": 60.0,
        "joules": {"cpu": 0.25 * joules, "gpu": 0.75 * joules},
        "total_j": joules,
        "net_j": 0.9 * joules,
        "mean_w": joules / 60,
        "tokens": tokens,
        "uncertainty": {},
        "why": {},
        "flags": [],
        "tail_s": 0.0,
    }


def energy(per_token):
    return {
        "j_per_token": interval(per_token),
        "net_j_per_token": interval(0.9 * per_token),
        "mean_w": interval(20 * per_token),
        "rails_j_per_token": {"cpu": 0.25 * per_token, "gpu": 0.75 * per_token},
        "window_s": 360.0,
        "flags": [],
    }


def cell(route, engine, metered, slower, context, rounds):
    tpot = TPOT[route] * slower * (1.2 if engine == "mlx-lm" else 1.0) * (1 + context / 4096)
    big, small, skip = SHARES[route]
    random = np.random.default_rng(len(route) + context)
    runs = [
        {
            "round": number // 2,
            "session": 0,
            "ttft_s": [0.5 * tpot * 32],
            "token_s": [(tpot * random.normal(1.0, 0.005, 15)).tolist()],
            "peak_bytes": 2_000_000,
            "working_bytes": 500_000,
            "prefill_energy": window(20.0, 320) if metered else None,
            "decode_energy": window(1000 * tpot, 150) if metered else None,
            "invalid_why": [],
        }
        for number in range(2 * rounds)
    ]
    sizes = f"p32 g16 b1 c{context}"
    return {
        "id": f"{engine} {route} auto float32 {sizes}",
        "engine": engine,
        "route": route,
        "strategy": "auto",
        "strategy_ran": "planned",
        "quantisation": "float32",
        "prompt_tokens": 32,
        "generated_tokens": 16,
        "batch": 1,
        "context": context,
        "big_layers": LAYERS * big,
        "gpu_work": {"strategy": "planned", "bits": 16, "bytes": 1e12 * tpot, "dispatches": 80.0, "waits": 0.0},
        "valid": True,
        "invalid_why": [],
        "runs": runs,
        "summary": {
            "rounds": rounds,
            "ttft_s": interval(0.5 * tpot * 32),
            "prefill_tps": interval(2 / tpot),
            "decode_tps": interval(1 / tpot),
            "tpot_s": interval(tpot),
            "inter_token_s": {"p50": tpot, "p95": 1.1 * tpot, "p99": 1.3 * tpot},
            "peak_bytes": 2_000_000,
            "working_bytes": 500_000,
            "bytes_per_token": 5e7 * tpot,
            "flops_per_token": 5e7 * tpot,
            "roofline_share": 0.5,
            "route_mix": {"big": big, "small": small, "skip": skip},
            "prefill_energy": energy(0.06) if metered else None,
            "decode_energy": energy(20 * tpot / 3) if metered else None,
            "why_no_energy": "" if metered else "no meter: this is a test",
            "edp_js": 20 * tpot / 3 * tpot if metered else None,
            "speed_up": interval(TPOT["big"] * slower / tpot),
            "byte_ratio": TPOT["big"] / tpot,
            "flop_ratio": TPOT["big"] / tpot,
        },
        "quality": {
            "loss": interval(LOSS[route]),
            "perplexity": float(np.exp(LOSS[route])),
            "kl": LOSS[route] - LOSS["big"],
            "argmax_agreement": SHARES[route][0] * 0.5 + 0.5,
            "tokens": 1024,
        }
        if engine == "duo-mlx"
        else None,
    }


DRAFTED = {"drafted": [40, 20], "accepted": [30, 10], "verifications": 40}  # 80 tokens


def speculating(plain, rounds):
    """The cell that is ``plain`` with drafts by small, in 0.85 of its time and energy."""
    found = copy.deepcopy(plain)
    tpot = 0.85 * plain["summary"]["tpot_s"]["median"]
    found |= {
        "id": f"{plain['id']} speculate small auto",
        "speculate": "small",
        "draft_tokens": "auto",
        "gpu_work": None,
    }
    of_run = {name: np.multiply(value, 2).tolist() for name, value in DRAFTED.items()}
    for run in found["runs"]:
        run["token_s"] = [[0.85 * each for each in generation] for generation in run["token_s"]]
        run["speculation"] = of_run | {"weight_bytes": 100_000_000, "cache_bytes": 4_000_000, "flops": 10**9}
    found["speculation"] = {name: np.multiply(value, 2 * rounds).tolist() for name, value in of_run.items()} | {
        "tokens_per_verification": 2.0,
        "bytes_per_token": 650_000.0,
        "flops_per_token": 1.5e6,
    }
    found["summary"] |= {
        "tpot_s": interval(tpot),
        "speed_up": interval(1 / 0.85),
        "bytes_per_token": 650_000.0,
        "byte_ratio": 1e6 / 650_000,
        "flop_ratio": 1e6 / 1.5e6,
    }
    if found["summary"]["decode_energy"]:
        found["summary"]["decode_energy"] = energy(20 * tpot / 3)
    return found


@pytest.fixture
def made_result():
    """``made_result(metered, slower, device, contexts, rounds, drafts)``: a valid result, whose times are ``slower``
    times as long; with ``drafts`` its last cell speculates."""

    def make(metered=True, slower=1.0, device="Test M9", contexts=(0,), rounds=5, drafts=False):
        cells = [
            cell(route, engine, metered, slower, context, rounds)
            for context in contexts
            for engine, route in [("mlx-lm", "big"), *(("duo-mlx", route) for route in TPOT)]
        ]
        if drafts:
            cells.append(speculating(cells[1], rounds))
        parts = {"embedding": 0.0001, "attention": 0.004, "norms": 0.0005, "big": 0.012, "small": 0.003}
        record = {
            "schema": results.SCHEMA,
            "command": "duo-mlx bench run --preset paper",
            "complete": True,
            "system": {
                "versions": {"duo-mlx": "0.1", "mlx": "0.32.4", "mlx-lm": "0.32.2", "python": "3.11.2"},
                "platform": "Darwin-25-arm64",
                "device": device,
                "power_source": "AC Power",
                "power_mode": {"powermode": 0},
            },
            "model": {"name": "embedded", "revision": None, "layers": LAYERS, "parameters": 1000, "sha256": "0" * 64},
            "texts": {
                "prompts": {"source": "bundled", "sha256": "1" * 64, "tokens": 900, "count": 12},
                "held_out": {"source": "bundled", "sha256": "2" * 64, "tokens": 1024, "count": 8},
            },
            "settings": {"preset": "paper", "seed": 0},
            "meter": {
                "name": "fake" if metered else "none",
                "label": "a fake SoC (cpu, gpu)" if metered else "",
                "scope": "soc" if metered else "",
                "why": "" if metered else "no meter: this is a test",
                "notes": [],
                "idle": window(120.0, 0) if metered else None,
            },
            "roofline": {"bandwidth_bytes_s": 1e10, "how": "products over weights beyond the caches"},
            "sessions": [
                {
                    "started": "2026-11-24T12:00:00+00:00",
                    "conditions": {"power_source": "AC Power"},
                    "cautions": [],
                    "noise_floor": interval(1.0, 0.004),
                }
            ],
            "parts": [
                {
                    "quantisation": "float32",
                    "context": context,
                    "seconds": parts | {"head": 0.002, "sampling": 0.0003},
                    "whole": {"big": {"run_s": 0.019, "graph_s": 0.002}, "small": {"run_s": 0.011, "graph_s": 0.002}},
                }
                for context in contexts
            ],
            "samples": {
                "ids": [11, 12, 13, 14],
                "tokens": ["It", " was", " the", " best"],
                "policies": [
                    {
                        "route": route,
                        "quantisation": "float32",
                        "patterns": [pattern] * 4,
                        "loss": [None, LOSS[route], LOSS[route] + 0.5, LOSS[route] - 0.5],
                    }
                    for route, pattern in (("big", "BBBB"), ("BBss", "BBss"), ("small", "ssss"))
                ],
            },
            "cells": cells,
        }
        results.check(record, "the made result")
        return record

    return make
