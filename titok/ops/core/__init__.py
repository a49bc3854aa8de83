"""What every op shares: registration, autograd, the choice of a back end, modes, and which back ends there are."""
