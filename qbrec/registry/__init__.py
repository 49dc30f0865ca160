"""The servable bundle: register, gate, promote, roll back, recommend."""
