"""Search for the merge of lowest held-out bits per byte: optuna over methods and their settings.

python -m fusechat.merge_search experiment=tiny search.trials=20
"""

from __future__ import annotations

from omegaconf import DictConfig

from fusechat.app.command import entry


def run(cfg: DictConfig) -> float:
    """Tries ``search.trials`` merges; leaves the best in ``output_dir`` and the table in ``search.folder``. Returns its bits per byte."""
    from fusechat.merging import search

    return search.run(cfg)


main = entry("merge_search")(run)
if __name__ == "__main__":
    main()
