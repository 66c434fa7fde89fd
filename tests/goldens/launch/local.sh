# process 0, at the same time as the others
env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 \
  JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo COORDINATOR_ADDRESS=127.0.0.1:12345 \
  PROCESS_COUNT=2 PROCESS_INDEX=0 python -m lm.train --config=configs/tiny.py \
  --workdir=runs/tiny &

# process 1, at the same time as the others
env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 \
  JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo COORDINATOR_ADDRESS=127.0.0.1:12345 \
  PROCESS_COUNT=2 PROCESS_INDEX=1 python -m lm.train --config=configs/tiny.py \
  --workdir=runs/tiny
