#!/usr/bin/env bash
# Build both images, with docker, podman or buildah, whichever is there.
#
#   REGISTRY        prefix of the names, such as registry.example.com/ml; empty: for this machine only
#   TAG             default: the version in pyproject.toml, which is also what the chart asks for
#   BASE_IMAGE      an image with Python >= 3.11 to build on; default: the one in the Dockerfiles
#   TORCH_VARIANT   cuda or cpu; default: cuda
#   CONTAINER_TOOL  to choose among docker, podman and buildah
#   BUILD_FLAGS     more flags for the tool's `build`, such as --build-arg PIP_INDEX_URL=https://pypi.example.com/simple
set -euo pipefail
cd "$(dirname "$0")"

# usable TOOL: docker's client may be there without a daemon that answers it.
usable() {
  command -v "$1" >/dev/null && { [[ $1 != docker ]] || docker info >/dev/null 2>&1; }
}

find_tool() {
  local tool
  for tool in docker podman buildah; do
    if usable "$tool"; then
      echo "$tool"
      return
    fi
  done
  echo 'make images: needs docker with its daemon, podman or buildah' >&2
  exit 2
}

tool=${CONTAINER_TOOL:-$(find_tool)}
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
tag=${TAG:-$version}
prefix=${REGISTRY:+${REGISTRY%/}/}
revision=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
# The time of the commit in place of the time of the build: the same sources give the same image.
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}

flags=(--build-arg "VERSION=$version" --build-arg "REVISION=$revision")
if [[ -n ${BASE_IMAGE:-} ]]; then flags+=(--build-arg "BASE_IMAGE=$BASE_IMAGE"); fi
case $(basename "$tool") in
  docker) flags+=(--build-arg "SOURCE_DATE_EPOCH=$epoch") ;;
  podman) flags+=(--timestamp "$epoch") ;;
  buildah) flags+=(--timestamp "$epoch" --layers) ;;
esac

# build NAME DOCKERFILE [FLAG...]
build() {
  local image=$prefix$1:$tag dockerfile=$2
  shift 2
  echo "== $image" >&2
  # BUILD_FLAGS is split on purpose: it holds several flags.
  # shellcheck disable=SC2086
  "$tool" build "${flags[@]}" "$@" ${BUILD_FLAGS:-} -f "$dockerfile" -t "$image" .
}

build finetune-operator operator/Dockerfile
build finetune-trainer trainer_image/Dockerfile --build-arg "TORCH_VARIANT=${TORCH_VARIANT:-cuda}"

echo
echo "Built ${prefix}finetune-operator:$tag and ${prefix}finetune-trainer:$tag."
if [[ -n $prefix ]]; then
  echo "Push them, then install the chart:"
  echo "  $tool push ${prefix}finetune-operator:$tag"
  echo "  $tool push ${prefix}finetune-trainer:$tag"
  echo "  helm install finetune charts/finetune-operator --namespace finetune --create-namespace \\"
  echo "    --set registry=${prefix%/} --set image.tag=$tag --set trainer.image.tag=$tag"
else
  echo "They have no registry's name: load them into the nodes (kind load docker-image ..., k3d image import ...),"
  echo "or build them again as \`make images REGISTRY=registry.example.com/ml\` and push them."
fi
