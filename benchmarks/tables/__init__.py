"""What benchmarks found, as Markdown: a function for each section of a page, given the directory of results."""
