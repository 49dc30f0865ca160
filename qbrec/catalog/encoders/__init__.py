"""From raw items to feature tokens: text, pictures, structure; built in or by a model's name."""
