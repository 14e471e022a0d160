"""The page. Every question goes through `Conversation`, as the API's do; nothing is kept on the server but the open tab's state."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from chatbot.config import Config
from chatbot.conversation import Admitted, Conversation, Delta, Done, ModelName, Question
from chatbot.errors import UserError
from chatbot.guardrails.base import Who
from chatbot.page import words
from chatbot.serving.prompt import Turn

log = logging.getLogger(__name__)

TUNED, BASE, BOTH = "Tuned", "Base", "Side by side"
SCRIPT = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
EXPORT = """(left, right, context) => window.chatbotExport(left, right, context)"""
THEME = "() => window.chatbotTheme()"

Messages = list[dict[str, Any]]


def text_of(message: Any) -> str:
    """A message's text; Gradio gives content as text or as a list of parts."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)


def turns_of(messages: Messages) -> list[Turn]:
    """The conversation in plain turns."""
    return [Turn(m["role"], text_of(m)) for m in messages if text_of(m)]


class Page:
    """The page's handlers."""

    def __init__(self, config: Config, conversation: Conversation) -> None:
        self.config, self.conversation = config, conversation
        self.stops: dict[str, asyncio.Event] = {}
        """By tab: set when its running answers should end."""

    def who(self, request: gr.Request) -> Who:
        state = request.request.scope.get("state", {})
        return Who(state.get("user", ""), state.get("address", ""))

    def head(self, request: gr.Request) -> tuple[str, str]:
        """Header and attribution, as of now."""
        service = self.conversation.service
        ready, state = service.ready()
        facts = service.current.facts if service.current else None
        root = self.config.server.root_path
        logout = f"{root}/logout" if self.config.access.mode == "users" else ""
        return (words.head(self.config.page.title, ready, state, facts, self.who(request).user, logout),
                words.about(facts, f"{root}/report"))

    def choices(self) -> Any:
        """The models that can be chosen, and whether the run's format takes a context."""
        served = self.conversation.service.current
        models = [TUNED, BASE, BOTH] if served and served.base else [TUNED]
        return gr.Radio(choices=models, visible=len(models) > 1)

    def context_box(self) -> Any:
        served = self.conversation.service.current
        return gr.Accordion(visible=served is None or served.prompt.takes_context)

    async def stop(self, request: gr.Request) -> None:
        """End this tab's running answers."""
        if event := self.stops.get(str(request.session_hash)):
            event.set()

    async def ask(self, left: Messages, right: Messages, mode: str, context: str, temperature: float, top_p: float, length: float,
                  request: gr.Request) -> AsyncIterator[tuple[Any, ...]]:
        """Answer the last message; yields (left, right, line under left, line under right, exchanges)."""
        question = Question(turns_of(left), (context or "").strip(), temperature, top_p, int(length), who=self.who(request))
        models: list[ModelName] = ["tuned", "base"] if mode == BOTH else ["base" if mode == BASE else "tuned"]
        sides = [[*left], [*right, left[-1]] if mode == BOTH else []]
        lines, exchanges = ["", ""], [""] * 2
        stop = self.stops[str(request.session_hash)] = asyncio.Event()
        queue: asyncio.Queue[tuple[int, Delta | Done | UserError | None]] = asyncio.Queue(maxsize=64)
        admitted = await self.conversation.admit(question)
        for side in sides[:len(models)]:
            side.append({"role": "assistant", "content": ""})

        async def run(i: int, model: ModelName) -> None:
            mine = Admitted(question_of(admitted, turns_of(sides[i][:-1])), admitted.checked)
            try:
                async with aclosing(self.conversation.answer(mine, model)) as parts:  # type: ignore[type-var]
                    async for part in parts:
                        await queue.put((i, part))
            except UserError as error:
                await queue.put((i, error))
            finally:
                await queue.put((i, None))

        tasks = [asyncio.create_task(run(i, model)) for i, model in enumerate(models)]
        stopped = asyncio.create_task(stop.wait())
        open_sides = len(tasks)
        try:
            while open_sides:
                getting = asyncio.create_task(queue.get())
                await asyncio.wait({getting, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    getting.cancel()
                    for i in range(len(models)):
                        lines[i] = lines[i] or words.line("stopped")
                    break
                # What has arrived meanwhile is shown with it: at many streams the page is not redrawn for each token.
                arrived = [getting.result()]
                while not queue.empty():
                    arrived.append(queue.get_nowait())
                for i, part in arrived:
                    if part is None:
                        open_sides -= 1
                    elif isinstance(part, Delta):
                        sides[i][-1] = {"role": "assistant", "content": sides[i][-1]["content"] + part.text}
                    elif isinstance(part, Done):
                        lines[i], exchanges[i] = words.answer_facts(part, models[i]), part.id
                    else:
                        lines[i] = words.line(str(part))
                        sides[i][-1] = {"role": "assistant", "content": sides[i][-1]["content"] or f"*{escape(str(part))}*"}
                yield sides[0], sides[1], lines[0], lines[1], exchanges
        finally:
            stopped.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.stops.get(str(request.session_hash)) is stop:
                del self.stops[str(request.session_hash)]
        yield sides[0], sides[1], lines[0], lines[1], exchanges

    def thumb(self, data: gr.LikeData, messages: Messages, context: str, exchanges: list[str], mode: str, request: gr.Request) -> None:
        """Keep a thumb on an answer."""
        i = data.index if isinstance(data.index, int) else data.index[0]
        if data.liked not in (True, False) and data.liked not in ("Like", "Dislike"):
            return
        kept = self.conversation.keeper.feedback({
            "exchange": exchanges[0] if i == len(messages) - 1 and exchanges[0] else f"{request.session_hash}-{i}",
            "vote": "up" if data.liked in (True, "Like") else "down", "question": text_of(messages[i - 1]) if i else "", "context": context,
            "answer": text_of(messages[i]), "model": "base" if mode == BASE else "tuned", "run": self._run()})
        gr.Info("Thank you." if kept else "Feedback is not kept here.", duration=3)

    def prefer(self, vote: str, left: Messages, right: Messages, context: str, exchanges: list[str]) -> None:
        """Keep which of two answers is better."""
        if not left or not right or left[-1]["role"] != "assistant":
            return
        kept = self.conversation.keeper.feedback({
            "exchange": exchanges[0], "vote": vote, "question": text_of(left[-2]), "context": context,
            "answer_tuned": text_of(left[-1]), "answer_base": text_of(right[-1]), "run": self._run()})
        gr.Info("Thank you." if kept else "Feedback is not kept here.", duration=3)

    def comment(self, comment: str, messages: Messages, context: str, exchanges: list[str], mode: str) -> str:
        """Keep a comment on the last answer."""
        if not comment.strip() or len(messages) < 2:
            return comment
        kept = self.conversation.keeper.feedback({
            "exchange": f"{exchanges[0]}-comment", "vote": "comment", "comment": comment, "question": text_of(messages[-2]),
            "context": context, "answer": text_of(messages[-1]), "model": "base" if mode == BASE else "tuned", "run": self._run()})
        gr.Info("Thank you." if kept else "Feedback is not kept here.", duration=3)
        return "" if kept else comment

    def _run(self) -> str:
        served = self.conversation.service.current
        return served.run.id if served else ""


def question_of(admitted: Admitted, turns: list[Turn]) -> Question:
    """The checked question with another side's conversation before it."""
    from dataclasses import replace
    return replace(admitted.question, turns=[*turns[:-1], admitted.question.turns[-1]])


def build(config: Config, conversation: Conversation) -> gr.Blocks:
    """The page's components and what connects them."""
    page = Page(config, conversation)
    feedback = conversation.keeper.takes_feedback
    with gr.Blocks(title=config.page.title, analytics_enabled=False, fill_width=True) as blocks:
        head = gr.HTML()
        gr.HTML(f'<p class="notice" role="note">{escape(conversation.pipeline.texts["notice"])}</p>')
        mode = gr.Radio([TUNED], value=TUNED, show_label=False, container=False, visible=False, elem_id="mode")
        exchanges = gr.State(["", ""])
        with gr.Row(elem_id="sides"):
            with gr.Column(min_width=280):
                left = gr.Chatbot(label="Tuned model", show_label=False, height="52vh", min_height=260, editable="user", elem_id="left",
                                  buttons=["copy", "copy_all"], feedback_options=("Like", "Dislike") if feedback else None,
                                  placeholder="Ask a research question; add the abstract it is about as context.",
                                  examples=[{"text": e} for e in config.page.examples], layout="bubble")
                left_line = gr.HTML(words.line(""))
            with gr.Column(min_width=280, visible=False) as right_column:
                right = gr.Chatbot(label="Base model", show_label=True, height="52vh", min_height=260, elem_id="right",
                                   buttons=["copy", "copy_all"], feedback_options=None, layout="bubble")
                right_line = gr.HTML(words.line(""))
        with gr.Row(visible=False) as votes:
            better_tuned = gr.Button("Tuned answered better", size="sm")
            better_base = gr.Button("Base answered better", size="sm")
        box = gr.Textbox(placeholder="Your question", show_label=False, label="Your question", lines=1, max_lines=6, max_length=4000,
                         submit_btn=True, stop_btn=False, autofocus=True, elem_id="box")
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
        with gr.Accordion("Context: the abstract that the question is about", open=False) as context_box:
            context = gr.Textbox("", show_label=False, label="Context", lines=6, max_lines=14, max_length=20000, elem_id="context",
                                 placeholder="Paste an abstract. It is put into the prompt in the form that the model was trained on.")
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                temperature = gr.Slider(0, 2, value=config.page.temperature, step=0.05, label="Temperature", info="0: the likeliest answer")
                top_p = gr.Slider(0.05, 1, value=config.page.top_p, step=0.05, label="Top-p")
                length = gr.Slider(1, max(512, config.page.max_tokens), step=1, value=config.page.max_tokens,
                                   label="Longest answer (tokens)")
            with gr.Row():
                export = gr.Button("Export conversation", size="sm")
                clear = gr.Button("New conversation", size="sm")
                theme = gr.Button("Light / dark", size="sm")
        with gr.Accordion("Comment on the last answer", open=False, visible=feedback):
            comment = gr.Textbox("", show_label=False, label="Comment", max_length=2000, submit_btn="Send",
                                 placeholder="What was wrong or right? Kept with the question and the answer; personal data is removed.")
        with gr.Accordion("About this model", open=False):
            about = gr.HTML(elem_classes="about")

        private: Any = {"api_visibility": "private"}
        quiet: Any = {**private, "queue": False, "show_progress": "hidden"}
        settings = [mode, context, temperature, top_p, length]
        shown = [left, right, left_line, right_line, exchanges]

        def begin(text: str, messages: Messages) -> tuple[Any, ...]:
            if not text.strip():
                raise gr.Error("Write a question first.", duration=4, print_exception=False)
            return "", [*messages, {"role": "user", "content": text.strip()}], gr.Button(visible=True), gr.Textbox(submit_btn=False)

        def before(messages: Messages, i: int) -> Messages:
            while i > 0 and messages[i]["role"] != "user":
                i -= 1
            return messages[:i]

        def again(data: gr.RetryData, messages: Messages, other: Messages) -> tuple[Any, ...]:
            i = data.index if isinstance(data.index, int) else data.index[0]
            kept = before(messages, i)
            return [*kept, messages[len(kept)]], other[:len(kept)], gr.Button(visible=True), gr.Textbox(submit_btn=False)

        def edited(data: gr.EditData, messages: Messages, other: Messages) -> tuple[Any, ...]:
            i = data.index if isinstance(data.index, int) else data.index[0]
            kept = before(messages, i)
            return ([*kept, {"role": "user", "content": str(data.value).strip()}], other[:len(kept)], gr.Button(visible=True),
                    gr.Textbox(submit_btn=False))

        def end() -> tuple[Any, ...]:
            return gr.Button(visible=False), gr.Textbox(submit_btn=True, interactive=True)

        def run_after(event: Any) -> None:
            event.success(page.ask, [left, right, *settings], shown, concurrency_limit=None, show_progress="hidden", **private).then(
                end, None, [stop, box], **quiet).then(page.head, None, [head, about], **quiet)

        run_after(box.submit(begin, [box, left], [box, left, stop, box], **quiet))
        run_after(left.retry(again, [left, right], [left, right, stop, box], **quiet))
        run_after(left.edit(edited, [left, right], [left, right, stop, box], **quiet))

        def example(data: gr.SelectData) -> str:
            return str(data.value["text"])

        left.example_select(example, None, box, **quiet)
        stop.click(page.stop, None, None, **quiet)
        blocks.unload(page.stop)
        clear.click(page.stop, None, None, **quiet).then(lambda: ([], [], words.line(""), words.line(""), ["", ""]), None, shown, **quiet)
        left.clear(page.stop, None, None, **quiet)

        def switch(value: str) -> tuple[Any, ...]:
            both = value == BOTH
            return (gr.Column(visible=both), gr.Row(visible=both and feedback), gr.Chatbot(show_label=both), [], [], words.line(""),
                    words.line(""), ["", ""])

        mode.change(switch, mode, [right_column, votes, left, *shown], **quiet)
        export.click(None, [left, right, context], None, js=EXPORT, **private)
        theme.click(None, None, None, js=THEME, **private)
        if feedback:
            left.like(page.thumb, [left, context, exchanges, mode], None, **quiet)
            comment.submit(page.comment, [comment, left, context, exchanges, mode], comment, **quiet)
            for button, vote in ((better_tuned, "tuned"), (better_base, "base")):
                button.click(lambda *a, vote=vote: page.prefer(vote, *a), [left, right, context, exchanges], None, **quiet)

        blocks.load(page.head, None, [head, about], **quiet)
        blocks.load(page.choices, None, mode, **quiet)
        blocks.load(page.context_box, None, context_box, **quiet)
        # A page that was opened while the model was loading shows when it is ready, and a newer run when it is served.
        timer = gr.Timer(10)
        timer.tick(page.head, None, [head, about], **quiet)
        timer.tick(page.choices, None, mode, **quiet)
    return blocks


def mount_page(app: Any, config: Config, conversation: Conversation) -> Any:
    """Show the page at / of the application."""
    blocks = build(config, conversation)
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    look = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "Consolas", "monospace"],
                          radius_size="md")
    blocks.queue(max_size=config.engine.streams + config.engine.waiting, default_concurrency_limit=None)
    return gr.mount_gradio_app(
        app, blocks, path="/", root_path=config.server.root_path or None, footer_links=[], run_history=False, enable_monitoring=False,
        ssr_mode=False, pwa=False, mcp_server=False, show_error=False, theme=look, css_paths=[Path(__file__).parent / "style.css"],
        head=f"<script>{SCRIPT}</script>", max_file_size=1)
