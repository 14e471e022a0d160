"""Puts the parts together: one ASGI application with page, API, probes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from chatbot.access.gate import Gate
from chatbot.config import Config


def prepare_environment(config: Config) -> None:
    """Say to libraries where they may write and that they must not call home. Before the first import of gradio or transformers."""
    temporary = Path(config.server.temporary)
    temporary.mkdir(parents=True, exist_ok=True)
    os.environ.update({
        "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(temporary / "gradio"), "GRADIO_RUN_HISTORY": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(temporary / "huggingface"), "DO_NOT_TRACK": "1",
        "MPLCONFIGDIR": str(temporary),
        "TRITON_CACHE_DIR": str(temporary / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(temporary / "inductor"),
        "TRANSFORMERS_VERBOSITY": "error"})


def make_app(config: Config) -> Gate:
    """The application. Nothing is loaded until its lifespan starts. Raises UserError for a configuration that cannot work."""
    prepare_environment(config)
    from fastapi import FastAPI

    from chatbot.api.routes import Routes
    from chatbot.conversation import Conversation
    from chatbot.guardrails.pipeline import Pipeline
    from chatbot.metrics import Metrics
    from chatbot.page.page import mount_page
    from chatbot.records.keeper import Keeper
    from chatbot.serving.service import Service

    metrics = Metrics()
    service = Service(config)
    pipeline = Pipeline(config.guardrails, lambda v: metrics.verdicts.labels(v.check, v.stage, v.action).inc())
    conversation = Conversation(service, pipeline, Keeper(config.records), metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(title=config.page.title, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(Routes(config, conversation).router)
    app = mount_page(app, config, conversation)
    return Gate(app, config.access, config.server, conversation)
