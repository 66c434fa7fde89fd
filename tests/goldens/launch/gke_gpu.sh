# submit
kubectl create --filename=- <<'EOF'
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: llama-1b
spec:
  failurePolicy:
    maxRestarts: 10
    rules:
    - name: final
      action: FailJobSet
      onJobFailureReasons:
      - PodFailurePolicy
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        parallelism: 4
        completions: 4
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values:
              - 2
              - 130
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            nodeSelector:
              cloud.google.com/gke-accelerator: nvidia-h100-80gb
            containers:
            - name: train
              image: us-docker.pkg.dev/my-project/my/image:1
              command:
              - bash
              - -c
              - |
                stopped=
                child=
                trap 'stopped=1; [ -z "$child" ] || tell' TERM
                tell() { kill -TERM "$child"; }
                supervise() {
                  local code
                  "$@" &
                  child=$!
                  [ -z "$stopped" ] || tell
                  wait "$child"
                  code=$?
                  while kill -0 "$child" 2> /dev/null; do  # the signal ended wait, not the run
                    wait "$child"
                    code=$?
                  done
                  child=
                  [ -z "$stopped" ] || code=143
                  return "$code"
                }
                bash -e -c 'pip install .' || exit 1
                [ ! -f .venv/bin/activate ] || . .venv/bin/activate
                supervise "$@"
              - launch
              - python
              - -m
              - lm.train
              - --config=configs/tiny.py
              - --workdir=gs://my-bucket/runs/llama-1b
              env:
              - name: COORDINATOR_ADDRESS
                value: llama-1b-slice-0-0.llama-1b:8476
              - name: PROCESS_COUNT
                value: '4'
              - name: PROCESS_INDEX
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
              resources:
                limits:
                  nvidia.com/gpu: 8
EOF
