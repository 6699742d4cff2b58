# The default run in a container, on a CPU:  docker build -t grpo . && docker run --rm -it -v "$PWD/runs:/grpo/runs" grpo
FROM python:3.11-slim
# The CPU build of torch first, so that pip does not fetch the one for CUDA, which is several GB.
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
WORKDIR /grpo
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt
COPY . .
CMD ["python", "grpo.py"]
