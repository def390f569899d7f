"""BERT-EMD (Li et al., EMNLP 2020): beta · (theta · (attention + hidden) + embedding) + prediction, every student layer with
every teacher layer, as much as transport says. The prediction's soft cross-entropy is a mean over the classes too.

Args:
    beta: Weight of all but the prediction.
    theta: Weight of attention and hidden states beside the embeddings.
    temperature: T of the prediction.
    emd_temperature: T of the layers' weights, with weights=softmax.
    projection: What the map to the teacher's width starts from: "random" or "identity".
"""

from fastkd.losses.bert_emd import BertEMDLoss
from fastkd.losses.kd import PredictionLoss
from fastkd.losses.projection import Projection

from .base import Method, Term, same_heads


class BertEMD(Method):
    Loss, hidden, every_layer, one_shape, reads_padding = BertEMDLoss, True, True, True, True

    def __init__(self, setup, beta=0.01, theta=1.0, temperature=1.0, emd_temperature=1.0, projection="random", **more):
        super().__init__(setup)
        same_heads(setup, "bert_emd", more.get("heads"))
        self.weights = {"attention": beta * theta, "hidden": beta * theta, "embedding": beta}
        self.prediction = PredictionLoss(kind="soft_ce", temperature=temperature)
        self.projection = Projection(setup.student.width, setup.teacher.width, start=projection)
        layers = setup.student.layers, setup.teacher.layers
        more |= {"causal": setup.student.causal, "process_group": setup.process_group}
        self.loss = BertEMDLoss(*layers, temperature=emd_temperature, **more)

    def forward(self, batch):
        self.loss.train(self.training and batch.advance)
        student, teacher = self.projection(list(batch.student.hidden)), list(batch.teacher.hidden)
        attention, hidden = self.loss(*self.scores(batch), student[1:], teacher[1:], batch.mask)
        values = attention, hidden, self.loss.embedding_loss(student[0], teacher[0], batch.mask)
        terms = batch.distil(self.prediction, "prediction", scale=1 / batch.classes())
        over = {"attention": ("pairs", True), "hidden": ("tokens", True), "embedding": ("tokens", False)}
        return terms | {name: Term(x, self.weights[name], *over[name]) for name, x in zip(over, values, strict=True)}
