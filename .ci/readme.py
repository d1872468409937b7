"README.md from nbs/index.ipynb: `python .ci/readme.py` writes it, a test compares. Markdown as it is, code as code, no outputs."
import json, re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def readme():
    cells, parts = json.loads((ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells'], []
    for c in cells:
        src = ''.join(c['source'])
        if not src or src.startswith('#| hide'): continue
        parts.append(src if c['cell_type'] == 'markdown' else f'```python\n{src}\n```')
    text = '\n\n'.join(parts)+'\n' # links in the notebook start from its own folder
    return re.sub(r'\]\((\d\d[a-z]?_|analysis/)', r'](nbs/\1', text).replace('](../', '](')


if __name__ == '__main__': (ROOT/'README.md').write_text(readme(), encoding='utf-8')
