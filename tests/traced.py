"""What a traced program computes."""

import math

import jax
from jax.extend.core import jaxprs_in_params


def products(jaxpr: jax.extend.core.Jaxpr) -> int:
    """FLOPs of its matrix products, each as often as its loop runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[dim] for dim in contracted)
            total += 2 * depth * equation.outvars[0].aval.size
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(map(products, jaxprs_in_params(equation.params)))
    return total
