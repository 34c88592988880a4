"""What is inside a model and what an edit changes there: plain typed results, to be drawn by `factpatch.report`."""
