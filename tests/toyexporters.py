"""Export targets from outside of the package, as a user would write them."""

from pathlib import Path

from clasp.convert.exporters.job import ExportJob, ExportReport


def vocabulary(job: ExportJob, out: Path) -> ExportReport:
    """Writes the tokenizer alone."""
    job.model.tokenizer.save(out)
    return ExportReport(["the tokenizer"], {"max_tokens": job.model.tokenizer.max_tokens})


def broken(job: ExportJob, out: Path) -> ExportReport:
    """Fails after it has written something."""
    (out / "half").write_text("half")
    raise OSError(28, "No space left on device")
