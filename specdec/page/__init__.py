"""The report page: figures of a benchmark and a viewer of a trace in one file that needs no network."""

from specdec.page.page import write_page

__all__ = ["write_page"]
