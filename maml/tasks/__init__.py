from maml.tasks.sinusoid import sinusoid as sinusoid
