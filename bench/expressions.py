"""Five expressions, from one operation to seven: what is timed, and what the tests compare."""

EXPRESSIONS = {
    1: "relu(a)",
    2: "mul(gelu(a), b)",
    3: "mul(gelu(a), sigmoid(b))",
    5: "add(max(swish(a), tanh(b)), mul(a, b))",
    7: "add(mul(elu(a), sigmoid(b)), max(tanh(a), gelu(leaky_relu(b))))",
}
