"""Items of equal content, and items that the same users bought; one for each group, if asked."""
