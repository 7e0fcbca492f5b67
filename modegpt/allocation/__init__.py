"""How much to remove where: block influence, sparsity per layer, integer ranks under an exact parameter budget."""
