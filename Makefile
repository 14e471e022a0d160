# Every target works from a fresh clone; the first call puts uv and a Python environment into the cache.
SHELL := /bin/bash -euo pipefail
.DEFAULT_GOAL := help
.PHONY: help up down status results ask images charts try test test-fast test-host e2e e2e-promotion e2e-nodes chaos fuzz scan test-slow lint clean promote rollback diff helm site-check site-up site-join site-down bundle bundle-load

CACHE ?= $(or $(LLM_FINETUNE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/llm-finetune)
export LLM_FINETUNE_CACHE := $(CACHE)
PYTHON ?= python3
UV_VERSION := 0.13.9
UV := $(CACHE)/bootstrap/bin/uv
export UV_CACHE_DIR := $(CACHE)/uv
export PYTHONPATH := $(CURDIR)
TOOLS := $(CACHE)/venv/tools/bin/python
TRAINER := $(CACHE)/venv/trainer/bin/python
CHATBOT := $(CACHE)/venv/chatbot/bin/python
TOOLS_VENV := $(CACHE)/venv/tools/.synced
TRAINER_VENV := $(CACHE)/venv/trainer/.synced
CHATBOT_VENV := $(CACHE)/venv/chatbot/.synced
CHECKOV_VENV := $(CACHE)/venv/checkov/.synced
CHROMIUM := /usr/bin/chromium

help: ## show this list
	@echo "llm-finetune: fine-tune Llama models across GPU servers, by git push"; echo
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

up: $(TOOLS_VENV) ## a real Kubernetes on this machine, a fine-tuned model, a chatbot at http://localhost:7860 (root)
	@$(TOOLS) -m tools up

down: $(TOOLS_VENV) ## take the local cluster away; caches and runs stay (root)
	@$(TOOLS) -m tools down

status: $(TOOLS_VENV) ## every component, Application, run and URL
	@$(TOOLS) -m tools status

results: $(TOOLS_VENV) ## numbers of the last run as one JSON object (RUN=name for another)
	@$(TOOLS) -m tools results $(if $(RUN),--run $(RUN))

ask: $(TOOLS_VENV) ## Q="...": the running chatbot's answer
	@$(TOOLS) -m tools ask "$${Q:?Give a question: make ask Q=\"...\"}"

try: $(TOOLS_VENV) $(TRAINER_VENV) $(CHATBOT_VENV) ## the same run without Kubernetes and without root, then the chatbot page
	@$(TOOLS) -m tools try

images: $(TOOLS_VENV) ## build the images; REGISTRY=host/path TAG=version pushes them and writes their digests
	@$(TOOLS) -m tools images $(if $(REGISTRY),--registry $(REGISTRY) --tag $(TAG))

charts: $(TOOLS_VENV) ## package the chart with the operator's CRDs; REGISTRY=host/path pushes it
	@$(TOOLS) -m tools charts $(if $(REGISTRY),--registry $(REGISTRY))

promote: $(TOOLS_VENV) ## FROM=dev TO=staging: promote a run by its evidence
	@$(TOOLS) -m tools promote --from $(FROM) --to $(TO)

rollback: $(TOOLS_VENV) ## ENV=staging: return to the release before
	@$(TOOLS) -m tools rollback $(ENV)

diff: $(TOOLS_VENV) ## ENV=local: what a push would change in the cluster
	@$(TOOLS) -m tools diff $(ENV)

helm: $(TOOLS_VENV) ## ENV=dev: the helm command that makes the same objects without Argo CD (CHART=oci://... for a pushed chart)
	@$(TOOLS) -m tools environments helm $(ENV) $(if $(CHART),--chart $(CHART))

site-check: $(TOOLS_VENV) ## ENV=dev: look at a cluster before training on it; writes site-check.html and .json (OUT=folder)
	@$(TOOLS) -m tools site-check $(ENV)

SITE_OPTIONS = $(if $(NIC),--nic $(NIC)) $(if $(ADDRESS),--address $(ADDRESS)) $(if $(NAME),--name $(NAME)) $(if $(BACKEND),--backend $(BACKEND))

site-up: $(TOOLS_VENV) ## NIC=eth1: first server of a cluster of several; prints the command for the others (root; ADDRESS NAME ROLE BACKEND)
	@$(TOOLS) -m tools site-up $(SITE_OPTIONS) $(if $(ROLE),--role $(ROLE))

site-join: $(TOOLS_VENV) ## SERVER= TOKEN= CA_HASH= PROGRAMS=: a further server (root; NIC ADDRESS NAME BACKEND LABELS TAINTS NAT)
	@$(TOOLS) -m tools site-join $(SITE_OPTIONS) $(if $(SERVER),--server $(SERVER)) $(if $(TOKEN),--token $(TOKEN)) \
	  $(if $(CA_HASH),--ca-hash $(CA_HASH)) $(if $(PROGRAMS),--programs $(PROGRAMS)) \
	  $(if $(LABELS),--labels $(LABELS)) $(if $(TAINTS),--taints $(TAINTS)) $(if $(NAT),--nat $(NAT))

site-down: $(TOOLS_VENV) ## take this server's node away; the cache stays (root)
	@$(TOOLS) -m tools site-down

bundle: $(TOOLS_VENV) ## ENV=dev: one archive with chart, images and their packages' lists, for a site without internet
	@$(TOOLS) -m tools bundle $(ENV)

bundle-load: $(TOOLS_VENV) ## BUNDLE=file REGISTRY=host/path: bring such an archive into a site's registry
	@$(TOOLS) -m tools bundle-load $(BUNDLE)

lint: $(TOOLS_VENV) ## ruff, mypy, environments, secrets, chart
	@$(TOOLS) -m tools.checks lint

test-fast: $(TOOLS_VENV) $(TRAINER_VENV) $(CHATBOT_VENV) ## lint, unit and chart tests: all that needs no cluster
	@$(TOOLS) -m tools.checks fast

test: $(TOOLS_VENV) $(TRAINER_VENV) $(CHATBOT_VENV) $(CHROMIUM) ## lint, unit, chart and end-to-end tests on the local cluster (root)
	@$(TOOLS) -m tools.checks all

test-host: $(TOOLS_VENV) ## make up interrupted three times, make down leaving nothing behind; ends without a cluster (root)
	@$(TOOLS) -m tools.checks host

e2e: $(TOOLS_VENV) $(TRAINER_VENV) $(CHROMIUM) ## end-to-end tests on the local cluster, promotion included (root)
	@$(TOOLS) -m tools.checks e2e

e2e-promotion: $(TOOLS_VENV) ## two environments on the running local cluster: train, promote, refuse, roll back (root)
	@$(TOOLS) -m tools.checks promotion

e2e-nodes: $(TOOLS_VENV) $(TRAINER_VENV) ## a second node, in a guest on this machine, beside the local cluster's: joined, lost, cut off (root)
	@$(TOOLS) -m tools.checks nodes

chaos: $(TOOLS_VENV) ## TRIES=1 FIRST=0: each fault at a random moment of a real run on the local cluster; an hour with TRIES=1 (root)
	@TRIES=$(or $(TRIES),1) FIRST=$(or $(FIRST),0) FAULTS_OUT=$(FAULTS_OUT) $(TOOLS) -m tools.checks chaos

test-slow: $(TOOLS_VENV) $(TRAINER_VENV) ## whole training runs on this machine with faults around them: minutes each, no cluster
	@$(TOOLS) -m tools.checks slow

fuzz: $(TOOLS_VENV) $(TRAINER_VENV) $(CHATBOT_VENV) ## CASES=10000: values, configurations, datasets, manifests, API, guardrails
	@FUZZ_CASES=$(or $(CASES),10000) $(TOOLS) -m tools.checks fuzz

scan: $(TOOLS_VENV) $(CHECKOV_VENV) ## kubeconform, kube-score and checkov over all that the chart renders (builds the first two)
	@$(TOOLS) -m tools.checks scan

clean: $(TOOLS_VENV) ## down, and remove caches and runs
	@$(TOOLS) -m tools clean

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=")'
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --target $(CACHE)/bootstrap uv==$(UV_VERSION) \
	  || { echo "pip is needed once, to fetch uv: apt-get install python3-pip"; exit 1; }

# One environment a part, exactly as its lock says; a changed lock renews it.
$(CACHE)/venv/%/.synced: %/pyproject.toml %/uv.lock | $(UV)
	@UV_PROJECT_ENVIRONMENT=$(CACHE)/venv/$* $(UV) sync --quiet --frozen --group test --project $* --python $(PYTHON)
	@touch $@

$(CHECKOV_VENV): tests/scan/checkov/pyproject.toml tests/scan/checkov/uv.lock | $(UV)
	@UV_PROJECT_ENVIRONMENT=$(CACHE)/venv/checkov $(UV) sync --quiet --frozen --project tests/scan/checkov --python $(PYTHON)
	@touch $@

# The pages' tests open them in it; test-fast, which needs no root, skips those where it is missing.
$(CHROMIUM):
	@command -v apt-get >/dev/null || { echo "The pages' tests need Chromium as $@: install it with your distribution's tools."; exit 1; }
	@echo "Chromium, for the pages' tests (apt-get) ..."
	@apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null
