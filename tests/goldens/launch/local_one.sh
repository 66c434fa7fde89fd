# process 0, at the same time as the others
env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 \
  JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo python -m lm.train \
  --config=configs/tiny.py --workdir=runs/tiny
