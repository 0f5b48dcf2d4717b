"""Training pipelines: Kubeflow Pipelines components, the pipeline, and its run on one machine."""
