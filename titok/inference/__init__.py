"""How inference computes fast: prepared weights, oneDNN, folded upsampling, memory that is kept."""
