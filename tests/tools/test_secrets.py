"""What looks like a secret is refused in environments/, and nothing else is."""

from __future__ import annotations

import base64
import random
from pathlib import Path

import pytest

from tools.layout import REPOSITORY
from tools.secrets_check import findings_of, scan

# Put together here, so that no file of the repository holds what looks like a token.
FAKE = {
    "hub": "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx",
    "github": "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8",
    "gitlab": "glpat-" + "x1Y2z3A4b5C6d7E8f9G0",
    "aws": "AKIA" + "IOSFODNN7EXAMPL0",
    "jwt": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl",
    "pem": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "url": "https://robot:" + "hunter2hunter2@git.example.com/x.git",
    "openai": "sk-" + "proj-AbCdEfGhIjKlMnOpQrSt",
}


@pytest.mark.parametrize("what", FAKE)
def test_tokens_are_found_and_not_repeated(what: str) -> None:
    (finding,) = findings_of(Path("site.yaml"), f"a: 1\nkey: {FAKE[what]}\n")
    assert finding.line == 2
    assert FAKE[what] not in finding.message


@pytest.mark.parametrize("line", [
    "password: Tr0ub4dor&3", 'HF_TOKEN: "abc DEF"', "  - {name: API_KEY, apiKey: Zm9vYmFy!}", "clientSecret: s3cr3t_Value",
    "value: q8Zr2LwX0vT5uYb9NcK4mPd7HsJf3GaE1iRo6Q==",
])
def test_secrets_by_name_or_by_look_are_found(line: str) -> None:
    assert [f.line for f in findings_of(Path("x"), line)] == [1]


@pytest.mark.parametrize("line", [
    "secretName: hugging-face", "tokenSecret: hf", "- {name: HF_TOKEN, secretName: hugging-face, key: token}", "token: ",
    "password: ${PASSWORD}", "max_new_tokens: 40", "tokens_per_step: 65536", "automountServiceAccountToken: false",
    "revision: 0e9e39f249a16976918f6564b8830bc894c89659", "sha256: " + "0123456789abcdef" * 4, "digest: sha256:" + "ab" * 32,
    "# create secret generic hugging-face --from-literal=token=...", "path: /export/llm-finetune/models/SmolLM2-135M-Instruct",
    "nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3", "url: https://git.example.com/ml/llm-finetune.git",
])
def test_names_digests_and_paths_are_not(line: str) -> None:
    assert list(findings_of(Path("x"), line)) == []


def test_random_secrets_of_unknown_form_are_found() -> None:
    made = random.Random(7)
    words = [base64.urlsafe_b64encode(made.randbytes(32)).decode() for _ in range(500)]
    found = [w for w in words if list(findings_of(Path("x"), f"data: {w}"))]
    assert len(found) > 490


def test_the_environments_of_this_checkout_hold_none() -> None:
    assert scan(REPOSITORY, ["environments", "argocd"]) == []
