"""Stages: run.yaml, what is done already, the command line's errors."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.trainer import tiny
from trainer import config as configuration
from trainer import stages
from trainer.__main__ import main
from trainer.errors import UserError
from trainer.paths import RunPaths


def test_run_yaml_is_the_resolved_configuration(tmp_path):
    config = tiny.config(tmp_path)
    paths = RunPaths.of(config)
    stages.write_run(config, paths)
    text = paths.config.read_text()
    assert configuration.load(str(paths.config)) == config and stages.config_sha256(config) in text.splitlines()[0]
    stages.write_run(config, paths)
    assert paths.config.read_text() == text


def test_changed_inputs_under_the_same_id_are_refused(tmp_path):
    stages.write_run(tiny.config(tmp_path), RunPaths.of(tiny.config(tmp_path)))
    changed = tiny.config(tmp_path, train={"learning_rate": 0.5}, seed=3)
    with pytest.raises(UserError, match=r"run.seed \(17, now 3\), run.train.learning_rate \(0.02, now 0.5\)"):
        stages.write_run(changed, RunPaths.of(changed))


def test_other_resources_are_the_same_run(tmp_path):
    config = tiny.config(tmp_path)
    stages.write_run(config, RunPaths.of(config))
    more = configuration.parse({**configuration.to_dict(config), "resources": {"workers": 3}})
    stages.write_run(more, RunPaths.of(more))
    assert stages.config_sha256(config) == stages.config_sha256(more)


def test_finished_needs_report_and_whole_model(tmp_path):
    paths = RunPaths.of(tiny.config(tmp_path))
    paths.root.mkdir(parents=True)
    assert stages.finished(paths) is None
    for kind in ("md", "html"):
        paths.report(kind).write_text("x")
    paths.report("json").write_text(json.dumps({"run": "tiny"}))
    assert stages.finished(paths) is None
    from trainer.files import write_directory

    write_directory(paths.model, lambda d: (d / "w").write_text("weights") and {})
    assert stages.finished(paths) == {"run": "tiny"}
    (paths.model / "w").write_text("cut")
    assert stages.finished(paths) is None
    paths.report("json").write_text('{"run": "ti')
    assert stages.finished(paths) is None


def test_a_finished_run_returns_its_summary_without_ray(tmp_path, capsys):
    config = tiny.config(tmp_path)
    paths = RunPaths.of(config)
    stages.write_run(config, paths)
    from trainer.files import write_directory

    write_directory(paths.model, lambda d: (d / "w").write_text("weights") and {})
    for kind in ("md", "html"):
        paths.report(kind).write_text("x")
    paths.report("json").write_text(json.dumps({"run": "tiny", "state": "finished", "secret": 1}))
    assert main(["run", "--config", str(paths.config)]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["run"] == "tiny" and line["state"] == "finished" and "secret" not in line
    import ray

    assert not ray.is_initialized()


@pytest.mark.parametrize(("document", "message"), [
    ({"run": {"name": "x"}}, "run.model: None is not usable. This field is required."),
    ({"run": {"name": "Bad Name", "model": {"path": "m"}, "data": {"sample": True}}}, "run.name: 'Bad Name' is not usable."),
    ("text", "The file must be a mapping"),
])
def test_configuration_errors_are_one_message_and_exit_code_2(tmp_path, capsys, document, message):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(document))
    assert main(["run", "--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and message in err and "Traceback" not in err


def test_missing_storage_names_the_remedy(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(configuration.to_dict(tiny.config(tmp_path / "nowhere"))))
    assert main(["run", "--config", str(path)]) == 2
    assert "nowhere does not exist. Mount the shared storage" in capsys.readouterr().err


def test_driver_does_not_import_torch():
    code = "import sys, trainer.__main__, trainer.launch; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_help_names_every_command():
    out = subprocess.run([sys.executable, "-m", "trainer", "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("plan", "prepare", "train", "evaluate", "export", "report", "run", "schema"):
        assert command in out


def test_layout_tells_workers_in_order_and_alike_ones_once():
    assert stages.describe_layout(["a", "a", "b", "a"], [2, 2, 1, 1]) == [
        {"device": "a", "workers": 2, "node_workers": 2}, {"device": "b", "workers": 1, "node_workers": 1},
        {"device": "a", "workers": 1, "node_workers": 1}]
