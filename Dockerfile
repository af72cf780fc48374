# coral on a processor: docker build -t coral . && docker run -it coral chat --speculative
FROM python:3.12-slim
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip install --no-cache-dir '/src[serve,gguf]' && rm -r /src
WORKDIR /runs
ENTRYPOINT ["coral"]
