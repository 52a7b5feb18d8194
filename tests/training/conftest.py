from harness import cifar_run, digits_run, quick_and_private  # noqa: F401
