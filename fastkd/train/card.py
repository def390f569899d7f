"""The model card of a trained model: what it is, of what it was made, how good it is, how to load it."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from . import report, student


def write(folder, run, rows: list[dict]) -> None:
    """`folder`/README.md; run is an arguments.Run, rows are report.measure's."""
    made_of, task = run.model.teacher or run.model.student, run.data.task
    base = {} if Path(made_of).exists() else {"base_model": made_of}  # the hub knows no folders
    how = "knowledge-distillation" if run.method else "fine-tuning"
    metadata = ModelCardData(library_name="transformers", tags=["fastkd", how], **base)
    facts = {"Teacher" if run.method else "Trained from": made_of}
    if run.method:
        made = {
            "student_layers": "layers {} of the teacher",
            "student_config": "the teacher's kind with {}",
            "student": "{}",
        }
        facts["Student"] = next(text.format(x) for name, text in made.items() if (x := getattr(run.model, name)))
        facts["Method"] = run.method.method
    facts |= {
        "Task": task,
        "Data": run.data.dataset or run.data.train_file,
        "Longest text": f"{run.data.max_length} tokens",
    }
    versions = report.versions()
    facts["Versions"] = ", ".join(f"{name} {versions[name]}" for name in ("fastkd", "torch", "transformers"))
    plain = {name: " ".join(str(value).split()).replace("`", "'") for name, value in facts.items()}
    lines = "\n".join(f"- {name}: `{value}`" for name, value in plain.items())
    text = f"---\n{metadata.to_yaml()}\n---\n\n# {Path(made_of).name}, {'distilled' if run.method else 'fine-tuned'}\n\n{lines}\n"
    if rows:
        head, *body = report.table(rows)
        rule = ["---", *["---:"] * (len(head) - 1)]
        text += "\n" + "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body)) + "\n"
    kind = student.AUTO[task].__name__
    text += f"""
```python
from transformers import AutoTokenizer, {kind}

model = {kind}.from_pretrained("this-folder-or-repository")
tokenizer = AutoTokenizer.from_pretrained("this-folder-or-repository")
```
"""
    ModelCard(text, ignore_metadata_errors=True).save(Path(folder) / "README.md")
