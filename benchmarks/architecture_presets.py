"""Write the presets chosen by architecture into presets/.

python benchmarks/architecture_presets.py
"""

from vllm_kvpca.calibration.architecture import ARCHITECTURES, write_card
from vllm_kvpca.preset import save_preset
from vllm_kvpca.preset.find import shipped_root

for one in ARCHITECTURES:
    save_preset(shipped_root() / one.preset, one.config(), {}, write_card(one))
    print(shipped_root() / one.preset)
