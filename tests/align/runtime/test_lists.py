"""Settings that take several values, from a file."""

from trl import DPOConfig

from plumbline.align.runtime.launch import parse_settings, trainer_defaults


def test_a_file_may_hold_a_list(tmp_path):
    file = tmp_path / "dpo.yaml"
    file.write_text(f"loss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.2]\noutput_dir: {tmp_path}\n", encoding="utf-8")
    (args,) = parse_settings((DPOConfig,), ["--config", str(file)], defaults=trainer_defaults())
    assert args.loss_type == ["sigmoid", "sft"] and args.loss_weights == [1.0, 0.2]
