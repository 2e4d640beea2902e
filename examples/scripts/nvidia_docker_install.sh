#!/usr/bin/env bash
# Install Docker and NVIDIA's container toolkit on Ubuntu or Debian, so that containers can use the GPUs. Asks for the
# password of sudo; the driver must be installed already (nvidia-smi).
set -euo pipefail
[ "${SMOKE:-0}" = 0 ] || source "$(dirname "${BASH_SOURCE[0]}")/smoke.sh"

sudo apt-get update
sudo apt-get install --yes ca-certificates curl gnupg docker.io

# The packages of the toolkit are signed; apt checks them against this key.
key=/usr/share/keyrings/nvidia-container-toolkit-keyring.gpg
packages=https://nvidia.github.io/libnvidia-container
curl --fail --silent --show-error --location "$packages/gpgkey" | sudo gpg --dearmor --yes --output $key
echo "deb [signed-by=$key] $packages/stable/deb/\$(ARCH) /" |
  sudo tee /etc/apt/sources.list.d/nvidia-container-toolkit.list >/dev/null

sudo apt-get update
sudo apt-get install --yes nvidia-container-toolkit
sudo nvidia-ctk runtime configure --runtime=docker
sudo systemctl restart docker
sudo docker run --rm --gpus all ubuntu nvidia-smi
