"""The complete example of seed 4 (section 7.1): only its imports are others.

And its main part is a function, which returns what the tests look at.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.ao.quantization import DeQuantStub, QuantStub

from pyobserver.horizon import (
    ConvDtypeTemplate,
    FakeQuantize,
    FakeQuantState,
    HistogramObserver,
    March,
    MatmulDtypeTemplate,
    MinMaxObserver,
    ModuleNameTemplate,
    QConfig,
    QconfigSetter,
    SensitivityTemplate,
    export,
    prepare,
    qint8,
    qint16,
    set_fake_quantize,
    set_march,
)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm2d(64)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return x


class HeadA(nn.Module):
    def __init__(self, in_channels, num_classes=10):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc1 = nn.Linear(in_channels, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x):
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = self.fc2(x)
        return x


class HeadB(nn.Module):
    def __init__(self, in_channels, output_dim=4):
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(in_channels * 8 * 8, output_dim)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(x, (8, 8))
        x = self.flatten(x)
        x = self.fc(x)
        return x


class MyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.headA = HeadA(in_channels=64, num_classes=10)
        self.headB = HeadB(in_channels=64, output_dim=4)
        self.quant = QuantStub()
        self.dequant_A = DeQuantStub()
        self.dequant_B = DeQuantStub()

    def forward(self, x):
        x = self.quant(x)
        feat = self.backbone(x)
        outA = self.headA(feat)
        outB = self.headB(feat)
        return self.dequant_A(outA), self.dequant_B(outB)


def main():
    # 1. model and input
    model = MyNet()
    input_tensor = torch.randn(1, 3, 32, 32) * 1000

    # 2. chip
    set_march(March.NASH_M)

    # 3. sensitive nodes
    out_weight_int16 = ["backbone.conv1", "backbone.conv2"]
    sensitive_list = []
    for name in out_weight_int16:
        sensitive_list.append((name, "output"))
        sensitive_list.append((name, "weight"))

    # 4. QConfig
    qconfig = QConfig(
        weight=FakeQuantize.with_args(
            observer=MinMaxObserver,
            averaging_constant=0.01,
            dtype=qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        ),
        output=FakeQuantize.with_args(
            observer=HistogramObserver,
            dtype=qint8,
            qscheme=torch.per_tensor_symmetric,
            ch_axis=-1,
        ),
    )

    # 5. QconfigSetter
    qconfig_setter = QconfigSetter(
        reference_qconfig=qconfig,
        templates=[
            ModuleNameTemplate({"": qint8}),
            ConvDtypeTemplate(input_dtype=qint8, weight_dtype=qint8),
            MatmulDtypeTemplate(input_dtypes=qint8),
            SensitivityTemplate(sensitive_list, 1.0),
        ],
    )

    # 6. prepare
    calib_net = prepare(model, (input_tensor,), qconfig_setter=qconfig_setter)
    calib_net.eval()

    # 7. calibrate
    set_fake_quantize(calib_net, FakeQuantState.CALIBRATION)
    with torch.no_grad():
        calib_net(input_tensor)

    # 9. mixed precision: all of headB in int16
    for name, mod in calib_net.named_modules():
        if "headB" in name:
            if hasattr(mod, "weight_fake_quant") and mod.weight_fake_quant is not None:
                mod.weight_fake_quant.reset_dtype(qint16)
            if hasattr(mod, "activation_post_process") and mod.activation_post_process is not None:
                mod.activation_post_process.reset_dtype(qint16)

    HistogramObserver.reset_scale(calib_net, method="mse", dtype=qint16)

    # 10. validate and export
    calib_net.eval()
    set_fake_quantize(calib_net, FakeQuantState.VALIDATION)
    qat_bc = export(calib_net, input_tensor)
    print("exported")
    return model, input_tensor, calib_net, qat_bc


if __name__ == "__main__":
    main()
