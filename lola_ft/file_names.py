"""Names of the files and folders that one part of lola_ft writes and another part reads."""

# In a run folder
RECIPE_FILE = "recipe.yaml"
MANIFEST_FILE = "manifest.json"
METRICS_FILE = "metrics.jsonl"
ADAPTER_FOLDER = "adapter"
START_FOLDER = "start"
REFERENCE_FILE = "reference.safetensors"
CHECKPOINTS_FOLDER = "checkpoints"
MERGED_FOLDER = "merged"
REPORT_FILE = "report.html"
LOSS_PLOT, LANGUAGES_PLOT, ROUTING_PLOT = "loss.png", "languages.png", "routing.png"

# In a model's folder
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
MERGE_REPORT_FILE = "merge_report.json"

# In several kinds of folders
CARD_FILE = "README.md"
