"""Fashion-MNIST at 28x28, class-conditional: the model that ships, trained on a laptop's CPU.

    python main.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

Measured on two shared CPU cores (JAX 0.10, XLA_FLAGS=--xla_force_host_platform_device_count=2): 3 h 24 min of training,
250 images/s at best. The model that ships had its first 16,000 steps with the learning rate's cosine ending there, and
went on from that checkpoint to 40,000 with the cosine of this config. Of 10,000 samples (guidance 1.25, 25 DDIM steps)
the classifier that ships, itself 92.3% right on the test set, reads 94.7% as the label asked for (97.2% at guidance
1.5, 99.8% at 3); Frechet distance to the test set 0.021 (the training set's: 0.0016), precision 0.89, recall 0.84,
coverage 0.94; near copies 0.18% (test images: 1%), exact copies 0.
"""

from diffusion_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = 'fashion_mnist'

    config.model.patch_size = 2
    config.model.channels = 40
    config.model.channel_multipliers = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (7,)
    config.model.time_conditioning = 'scale_shift'
    config.schedule.name = 'cosine'
    config.loss.prediction = 'v'
    config.loss.weighting.name = 'min_snr'
    config.loss.time_sampler = 'stratified'
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.decay = 'cosine'
    config.ema_decay = 0.9995

    config.train.num_steps = 40_000
    config.train.batch_size = 64
    config.train.log_every = 100
    config.train.eval_every = 1000
    config.train.sample_every = 4000
    config.train.checkpoint_every = 1000

    config.sample.num = 80
    config.sample.steps = 25
    config.sample.guidance_scale = 1.25
    config.evaluate.evaluators = ('frechet_distance', 'precision_recall', 'class_agreement', 'nearest_neighbour')
    config.evaluate.reference = 'test'
    config.evaluate.num = 2000
    return config
