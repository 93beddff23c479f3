//! fp16 against bf16 (against fp32): stability and speed on this device.
