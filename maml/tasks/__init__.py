"""Task distributions: each factory here is a sampler, `sampler(keys) -> tasks`."""

from maml.tasks.episodes import ClassImages as ClassImages
from maml.tasks.episodes import episodes as episodes
from maml.tasks.episodes import rotated_classes as rotated_classes
from maml.tasks.few_shot import tfds_few_shot as tfds_few_shot
from maml.tasks.images import image_folder as image_folder
from maml.tasks.images import omniglot as omniglot
from maml.tasks.markov import expected_entropy as expected_entropy
from maml.tasks.markov import markov as markov
from maml.tasks.navigation import navigation as navigation
from maml.tasks.navigation import point_mass as point_mass
from maml.tasks.sinusoid import sinusoid as sinusoid
from maml.tasks.value_prediction import boyan_chain as boyan_chain
from maml.tasks.value_prediction import value_prediction as value_prediction
