# submit
kubectl create --filename=- <<'EOF'
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: llama-1b
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
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
    replicas: 2
    template:
      spec:
        completionMode: Indexed
        parallelism: 16
        completions: 16
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
            terminationGracePeriodSeconds: 25
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: tpu-v6e-slice
              cloud.google.com/gke-tpu-topology: '8x8'
              cloud.google.com/gke-spot: 'true'
              topology.kubernetes.io/zone: us-west4-a
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Exists
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
                [ ! -f .venv/bin/activate ] || . .venv/bin/activate
                supervise "$@"
              - launch
              - python
              - -m
              - lm.train
              - --config=configs/tiny.py
              - --workdir=gs://my-bucket/runs/llama-1b
              resources:
                limits:
                  google.com/tpu: 4
EOF
