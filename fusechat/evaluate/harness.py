"""lm-evaluation-harness through its Python API: its tasks, or local task files, as samples that can be compared."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.outputs import file_hash
from fusechat.evaluate.kinds import EVALUATIONS, Job, Sample, Work


@EVALUATIONS.register("lm_eval", "tasks of lm-evaluation-harness")
def lm_eval(job: Job) -> Work:
    """Every setting is an argument of `run_tasks`; local task files decide the result by their content."""
    job.refuse_server()
    options = {key: value for key, value in job.settings.items() if key != "kind"}
    folder = options["include_path"]
    own = sorted(file for file in Path(folder).rglob("*") if file.is_file()) if folder else []

    def measure(part: Path) -> dict[str, Any]:
        samples, results = run_tasks(job.model, seed=job.seed, **options)
        return {"harness": results, "samples": samples}

    return Work(measure, {"own_tasks": {str(file): file_hash(file) for file in own}})


def run_tasks(
    path: str,
    tasks: Sequence[str],
    *,
    include_path: str | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int | str,
    apply_chat_template: bool,
    dtype: str,
    device: str | None,
    trust_remote_code: bool,
    seed: int,
) -> tuple[list[Sample], dict[str, Any]]:
    """Runs the tasks on a model directory or Hub id.

    Returns samples (id, tag = task, one number per metric) and the harness' own results. Raises `UserError` where the
    harness is not installed or a task is unknown (with the near names).
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("evaluation=lm_eval needs lm-evaluation-harness: pip install 'fusechat[eval]'") from error
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            near = ", ".join(difflib.get_close_matches(task, manager.all_tasks, n=3))
            near = near or "see evaluation.include_path for tasks of your own"
            raise UserError(f"evaluation.tasks: the harness knows no task {task!r}; near: {near}")
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    found: Any = simple_evaluate(
        model="hf",
        model_args={"pretrained": path, "dtype": dtype, "trust_remote_code": trust_remote_code},
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=None if device == "auto" else device,
        limit=limit,
        apply_chat_template=apply_chat_template,
        task_manager=manager,
        bootstrap_iters=0,
        **seeds,
    )
    return samples_of(found["samples"]), found["results"]


def samples_of(by_task: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Sample]:
    """The harness' per-sample records, as far as they are numbers."""
    found = []
    for task, records in sorted(by_task.items()):
        for record in records:
            kept = f"/{record['filter']}" if record.get("filter", "none") != "none" else ""
            measured = {name: record.get(name) for name in record["metrics"]}
            numbers = {name: float(value) for name, value in measured.items() if isinstance(value, (int, float))}
            found.append({"id": f"{task}/{record['doc_id']}{kept}", "tag": task, **numbers})
    return found
